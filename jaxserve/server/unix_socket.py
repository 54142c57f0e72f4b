"""Unix sockets to listen on, which are files."""

from __future__ import annotations

import os
import socket
import stat

from jaxserve.errors import ConfigError


def bind_unix(name: str, path: str) -> socket.socket:
    """A socket at ``path``, in place of one that a server left there when it died. Raises ConfigError, which calls the
    setting by ``name``, for one that is in use and any other reason why there can be none.
    """
    _remove_dead(name, path)
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise ConfigError(f"{name}: cannot listen on {path!r}: {error.strerror or error}") from None
    return bound


def _remove_dead(name: str, path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError(f"{name} must be a socket or not be there, got the file {path!r}")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:  # nobody listens
        os.unlink(path)
    except OSError:  # nothing is there, or bind says what is wrong
        return
    else:
        raise ConfigError(f"{name} {path!r} is in use")
