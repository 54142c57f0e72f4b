"""Jax's profiler on demand, by vLLM's paths."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from pathlib import Path

import orjson
from fastapi import FastAPI
from starlette.responses import Response

from jaxserve.errors import ConfigError, RequestError
from jaxserve.server.http.errors import Failure


def add_profiling(app: FastAPI, folder: str | None) -> None:
    """Serve /start_profile and /stop_profile, which refuse without a ``folder``. Raises ConfigError."""
    profiler = None if folder is None else Profiler(folder)

    def given() -> Profiler:
        if profiler is None:
            message = "profiling needs the flag --profiler-dir FOLDER, which the server was started without"
            raise Failure(HTTPStatus.NOT_FOUND, "invalid_request_error", message)
        return profiler

    @app.post("/start_profile")
    async def start_profile() -> Response:
        await given().start()
        return Response()

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        files = await given().stop()
        return Response(orjson.dumps({"files": [str(file) for file in files]}), media_type="application/json")


class Profiler:
    """Jax's, of which a process has one. It writes below ``folder``, for XProf, TensorBoard and Perfetto.

    Raises ConfigError for a folder that cannot be made.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profiler_dir: cannot make the folder {folder!r}: {error.strerror}") from None
        self._lock = asyncio.Lock()
        self._earlier: set[tuple[Path, int]] | None = None
        """Files as they were at the start; None while no profile is taken."""

    async def start(self) -> None:
        """Raises RequestError when a profile is being taken."""
        import jax

        async with self._lock:
            if self._earlier is not None:
                raise RequestError("a profile is being taken already: POST /stop_profile ends it")
            await asyncio.to_thread(jax.profiler.start_trace, self._folder)
            self._earlier = self._files()

    async def stop(self) -> list[Path]:
        """The files of the profile. Raises RequestError when none is being taken."""
        import jax

        async with self._lock:
            if self._earlier is None:
                raise RequestError("no profile is being taken: POST /start_profile begins one")
            earlier, self._earlier = self._earlier, None
            await asyncio.to_thread(jax.profiler.stop_trace)
            return sorted(path for path, _ in self._files() - earlier)

    def _files(self) -> set[tuple[Path, int]]:
        """With the time of their last change: profiles of one second have the same names."""
        return {(path, path.stat().st_mtime_ns) for path in self._folder.rglob("*") if path.is_file()}
