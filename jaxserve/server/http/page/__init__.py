"""The page at ``/``: a chat with the model, and beside it the engine's steps as they happen. Its files stand here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import Response

PAGE: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/server.js": ("server.js", "text/javascript"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/steps.js": ("steps.js", "text/javascript"),
}
"""The paths that make up the page, and the file and type behind each."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Nothing comes from another host or goes to one, and no text can become HTML."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page."""
    for path, (name, media_type) in PAGE.items():
        content = resources.files(__name__).joinpath(name).read_bytes()
        app.add_route(path, partial(_file, content, media_type), ["GET"], include_in_schema=False)


async def _file(content: bytes, media_type: str, request: Request) -> Response:
    return Response(content, headers=HEADERS, media_type=media_type)
