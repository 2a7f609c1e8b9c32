"""``GET /``: one page to try the model and to watch the cluster. Its files are served as they are."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FILES = {
    "/": ("page.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/main.js": ("main.js", "text/javascript"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/state.js": ("state.js", "text/javascript"),
    "/page/draw.js": ("draw.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path -> file and media type."""

PAGE_PATHS = tuple(FILES)
"""Nothing secret is in these files, and a browser sends no key for them: they are for everybody."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""The page loads nothing from elsewhere, runs nothing inline, and can't be framed."""


def page_routes() -> list[BaseRoute]:
    """A route for each file of the page."""
    folder = resources.files(__name__)
    return [_route(path, (folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()]


def _route(path: str, content: bytes, media_type: str) -> Route:
    async def send(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return Route(path, send)
