"""Who a request is from, as a browser tells it: pages of other hosts may not use what listens on
this machine for its user alone."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def foreign(method: str, headers: Mapping[str, str], *, any_host: bool = False) -> str:
    """Say why a request is not answered; empty where it is.

    Args:
        headers: `host` and `origin`, as far as they are there.
        any_host: whether requests may name the machine as they like. On the loopback address they
            must not: a page elsewhere could make its own name lead here (DNS rebinding).
    """
    host, origin = headers.get("host", ""), headers.get("origin", "")
    if not any_host and _name(host) not in _LOOPBACK:
        return "this is for this machine alone: name it 127.0.0.1 or localhost"
    if method not in ("GET", "HEAD") and origin and urlsplit(origin).netloc != host:
        return "a page of another address may not use this one"
    return ""


def _name(host: str) -> str:
    """Return a host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
