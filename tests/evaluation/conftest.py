"""The fake engine's server, for the load generator."""

from __future__ import annotations

from tests.server.conftest import eventually, make_server, server

__all__ = ["eventually", "make_server", "server"]
