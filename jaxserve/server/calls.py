"""What is told of every call, whatever the protocol: a line of the log with fields of its own, and a count."""

from __future__ import annotations

import logging
import re
import time
import uuid

from prometheus_client import CollectorRegistry, Counter

from jaxserve.server.caller import Caller

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""An X-Request-Id that is taken over; any other is replaced, for it goes into headers and the log."""


def name_of(request_id: str) -> str:
    """What a call is called: by its caller, or else a new name."""
    return request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex


class Calls:
    """Those of one server. ``registry``: where they are counted."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        text = "Calls that have ended, by protocol (http, grpc) and status"
        self._ended = Counter("jaxserve_calls", text, ("protocol", "status"), registry=registry)

    def end(
        self,
        protocol: str,
        *,
        request_id: str,
        caller: Caller,
        method: str,
        path: str,
        status: str,
        started_seconds: float,
        level: int = logging.INFO,
    ) -> None:
        """One that has ended. ``level``: of its line."""
        self._ended.labels(protocol, status).inc()
        seconds = time.monotonic() - started_seconds
        fields = {
            "request_id": request_id, "caller": caller.name, "method": method, "path": path, "status": status,
            "seconds": seconds,
        }  # fmt: skip
        logger.log(level, "%s %s %s %r: %s in %.3f s", *fields.values(), extra=fields)
