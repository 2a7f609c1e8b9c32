"""The last line of a start: where to send requests, and one to try."""

from __future__ import annotations

import json
import logging

from ray import serve
from ray.serve.context import _get_global_client

logger = logging.getLogger("ray.serve")


def announce(served_model_name: str) -> None:
    """Log the URL of the application that this Serve replica belongs to, and a curl line, once it can answer."""
    host, port, prefix = _endpoint(serve.get_replica_context().app_name)
    logger.info(invitation(served_model_name, host=host, port=port, prefix=prefix))


def invitation(served_model_name: str, *, host: str, port: int, prefix: str) -> str:
    """The text of :func:`announce`; a server that listens on all interfaces is shown as 127.0.0.1."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    url = f"http://{host}:{port}{prefix.rstrip('/')}/v1"
    messages = [{"role": "user", "content": "Who are you?"}]
    body = json.dumps({"model": served_model_name, "messages": messages, "temperature": 0})
    return (
        f"{served_model_name} is ready at {url}\n"
        f"try: curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )


def _endpoint(app_name: str) -> tuple[str, int, str]:
    # Serve has no public way to ask for its own address; these are the details its REST interface gives out.
    details = _get_global_client().get_serve_details()  # type: ignore[union-attr]  # None only outside of Serve
    http = details["http_options"]
    return str(http["host"]), int(http["port"]), str(details["applications"][app_name].get("route_prefix") or "/")
