"""How the pages look, and the application that serves them: to whom they are meant for, alone."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dependencies import unchanged_process
from ..reporting.charts import chart_style
from ..serving.origins import foreign

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would tell that it is used
with unchanged_process():
    import gradio as gr

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["QUIETLY", "gr", "html", "page", "page_app"]

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "undocumented"}
"""How events are handled: Gradio describes those that it documents to whoever asks, token or not,
with what can be chosen."""

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Any]

_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""What a browser may load: from here alone. Gradio's own scripts are inline, and use eval."""
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "DejaVu Sans Mono", "monospace")


def page(title: str) -> gr.Blocks:
    """Return an empty page, to be filled in a `with`."""
    made: gr.Blocks = gr.Blocks(title=title, analytics_enabled=False, fill_width=True)
    return made


def html(value: str = "", *, name: str = "") -> Any:
    """Return a component that shows HTML as `page.css` has it; `name` is its id."""
    return gr.HTML(value, elem_id=name or None, apply_default_css=False)


def page_app(blocks: gr.Blocks, *, token: str = "", any_host: bool = False) -> FastAPI:
    """Return the application that serves a page.

    Args:
        token: the password that is asked for; empty: none is.
        any_host: whether requests may name the machine as they like. On the loopback address they
            must not: a page elsewhere could make its own name lead here, and use this one.
    """
    from fastapi import FastAPI

    def shows(_: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), token.encode())

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        auth=shows if token else None,
        auth_message="Any name, and as the password the token of this server." if token else None,
        show_error=False,
        max_file_size="16mb",
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=_theme(),
        head=f"<style>{_style()}</style>",
    )
    app.add_middleware(_Guard, any_host=any_host)
    return app


class _Guard:
    """Lets in who may come, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: Asgi, *, any_host: bool) -> None:
        self.app, self.any_host = app, any_host

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        headers = Headers(scope=scope)
        if refusal := foreign(scope["method"], headers, any_host=self.any_host):
            await PlainTextResponse(refusal, 403)(scope, receive, send)
            return

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
            await send(message)

        await self.app(scope, receive, guarded)


def _theme() -> gr.themes.Base:
    themes = gr.themes
    blue = themes.Color(
        *("#eff7fc", "#dceffa", "#b9def4", "#86c5ec", "#56b4e9", "#2a93d1"),
        *("#0072b2", "#005f95", "#004d79", "#063f61", "#062b43"),
        name="quantadapt",
    )
    made: gr.themes.Base = themes.Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue=themes.colors.slate,
        radius_size=themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        body_background_fill_dark="#14171a",
        background_fill_primary_dark="#1c2024",
        background_fill_secondary_dark="#181b1f",
        block_background_fill_dark="#1c2024",
        block_border_color_dark="#2b3036",
        border_color_primary_dark="#2b3036",
        input_background_fill_dark="#14171a",
        input_border_color_dark="#363c44",
        block_label_text_weight="500",
        block_title_text_weight="550",
    )
    return made


def _style() -> str:
    own = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f"{own}\n.qa-chart {{\n{chart_style()}}}\n"
