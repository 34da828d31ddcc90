"""`quantadapt studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..remote_code import trusting
from .commands import add
from .flags import TrustOption
from .listening import (
    PAGE,
    HostOption,
    PortOption,
    address_of,
    is_loopback,
    listening,
    need,
    serve_app,
    token_for,
)
from .session import session


def register(app: typer.Typer, name: str) -> None:
    """Add the command to `app`."""
    add(app, name, studio, "quantadapt studio", "quantadapt studio ~/experiments --port 8080")


def studio(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder that runs lie in.")
    ] = Path("runs"),
    host: HostOption = "127.0.0.1",
    port: PortOption = 7861,
    trust_remote_code: TrustOption = False,
) -> None:
    """Plan runs, start and watch them, and talk with them, in the browser.

    Each run is a process of its own, the command that the page shows; it goes on where the studio
    is left or ended. Runs that others have started in FOLDER are shown, and not touched.

    The page is for this machine alone. To open it to others, give their address with --host and set
    QUANTADAPT_TOKEN: that is the password then. Whoever has it can read this machine's files and
    start runs. The page loads nothing from elsewhere, and tells nobody anything.
    """
    with session() as shown, trusting(trust_remote_code):
        need("the studio", ("gradio",), "studio")
        token = token_for(host)
        root = _usable(folder)
        with listening(host, port) as listener:
            from ..studio.app import studio_page
            from ..studio.desk import Desk
            from ..studio.page import page_app

            desk = Desk(root, trust=trust_remote_code)
            app = page_app(studio_page(desk), token=token, any_host=not is_loopback(host))
            text = f"the studio is at {address_of(host, listener)}  (Ctrl-C stops)"
            shown.err.print(text, markup=False, soft_wrap=True)
            try:
                serve_app(app, listener, desk.close, **PAGE)
            finally:
                desk.close()
            if running := desk.runs.running:
                path, process = running
                shown.note(f"the run in {path} goes on; kill {process} ends it with a checkpoint")
            shown.err.print("stopped", markup=False)


def _usable(folder: Path) -> Path:
    """Return the folder. Raises SpecError where it is none."""
    from ..errors import Problem, SpecError
    from ..paths import path_problem

    if problem := path_problem(str(folder)):
        what = f"{str(folder)!r} is no path: {problem}"
        raise SpecError([Problem(what, "name a folder", "FOLDER")])
    found = folder.expanduser()
    if found.exists() and not found.is_dir():
        raise SpecError([Problem("it is no folder", "name a folder", str(folder))])
    return found
