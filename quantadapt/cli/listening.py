"""What the commands that serve share: where they listen, who may come, and how they end."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..errors import MissingDependency, Problem, SpecError
from ..machine import installed_version

TOKEN = "QUANTADAPT_TOKEN"
"""The variable that holds what others have to show."""
PAGE: dict[str, Any] = {"lifespan": "on", "timeout_graceful_shutdown": 1}
"""Options of uvicorn for pages: browsers leave a connection open for good."""
_WHERE = "Where"

HostOption = Annotated[str, typer.Option(help="The address to listen on.", rich_help_panel=_WHERE)]
PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_WHERE)
]


def need(what: str, libraries: Sequence[str], extra: str) -> None:
    """Raise MissingDependency where one of the libraries that `what` needs is not installed."""
    missing = [library for library in libraries if installed_version(library) is None]
    if missing:
        what = f"{what} needs {' and '.join(missing)}, which is not installed"
        raise MissingDependency(what, fix=f"pip install 'quantadapt[{extra}]'")


def token_for(host: str) -> str:
    """Return what others have to show. Raises SpecError where they could come without."""
    token = os.environ.get(TOKEN, "")
    if not token and not is_loopback(host):
        what = f"on {host}, whoever reaches this machine could use it"
        fix = f"set {TOKEN} to what others have to show, or leave --host out"
        raise SpecError([Problem(what, fix, "--host")])
    return token


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before any model is loaded. Raises SpecError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(*found[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(128)
    except OSError as error:
        what = f"{host}:{port} cannot be listened on: {(error.strerror or str(error)).lower()}"
        fix = "stop what listens there, or choose another --port (0 takes a free one)"
        raise SpecError([Problem(what, fix, "--port")]) from None
    return listener


def address_of(host: str, listener: socket.socket) -> str:
    """Return where the listener is reached, e.g. `http://127.0.0.1:8000`."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def serve_app(app: Any, listener: socket.socket, halt: Callable[[], None], **options: Any) -> None:
    """Run an ASGI application until SIGINT or SIGTERM.

    Args:
        halt: called at the signal: what must end before the open connections do.
        options: of uvicorn's.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            halt()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(app, log_level="warning", access_log=False, **options)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn stops at both, and then sends it again
        signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[listener])
