"""Who may call: API keys, for every protocol."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.server.caller import ANYBODY, Caller

logger = logging.getLogger(__name__)

NO_KEY = "a valid API key must be given as a bearer token"
"""What callers without one are told."""
VARIABLE = "JAXSERVE_API_KEYS"


class Keys:
    """The keys of the variable JAXSERVE_API_KEYS, apart by spaces, and of a file, one in a line; lines that begin with
    # are comments. Without any, everybody may call. Raises ConfigError for a file that cannot be read or has none.
    """

    def __init__(self, path: str | None, environment: Mapping[str, str] = os.environ) -> None:
        self._path = path
        self._fixed = environment.get(VARIABLE, "").encode().split()
        self._keys = self._read()

    def caller(self, authorization: bytes) -> Caller | None:
        """Who has put one of them into a header of this name, as a bearer token; None without any.

        How long it takes tells nothing of any key.
        """
        if not self._keys:
            return ANYBODY
        scheme, _, key = authorization.partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else b""
        found = [hmac.compare_digest(key, known) for known in self._keys]
        return Caller.of(key) if any(found) else None

    def reload(self) -> None:
        """Read the file again; where it cannot be, the keys stay."""
        try:
            self._keys = self._read()
        except ConfigError as error:
            logger.error("API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys", len(self._keys))

    def _read(self) -> list[bytes]:
        if self._path is None:
            return self._fixed
        try:
            lines = Path(self._path).read_bytes().split(b"\n")
        except OSError as error:
            raise ConfigError(f"api_key_file {self._path!r} cannot be read: {error.strerror}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"#")]
        if not keys:
            raise ConfigError(f"api_key_file must hold at least one key, got none in {self._path!r}")
        return self._fixed + keys
