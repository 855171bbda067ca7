"""Open a page in the browser, on this machine alone: live runs, adapters to try, recipes."""

import os
import tempfile

from finetune.errors import FinetuneError


def add_arguments(parser) -> None:
    parser.add_argument("--port", type=int, help="of 127.0.0.1; the first free one from 7860 on if not given")


def run(args) -> int:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="finetune-ui-") as sampled:
        os.environ["GRADIO_TEMP_DIR"] = sampled     # read when gradio is imported; what it keeps there goes at the end
        try:
            import gradio  # noqa: F401
        except ImportError as e:
            raise FinetuneError(f"finetune ui needs gradio, which cannot be loaded ({e})\n"
                                "    install it: pip install 'finetune[ui]'") from None
        from starlette.middleware import Middleware

        from finetune.commands._page import CSS, THEME, page

        served = page()
        try:
            _, address, _ = served.launch(
                server_name="127.0.0.1", server_port=args.port, share=False, quiet=True, prevent_thread_lock=True,
                ssr_mode=False, footer_links=[], theme=THEME, css=CSS, app_kwargs={"middleware": [Middleware(SameOrigin)]})
        except OSError as e:
            raise FinetuneError(f"--port {args.port}: {e}") from None
        print(f"{address} (Ctrl-C ends the page; what it started goes on)", flush=True)
        served.block_thread()
    return 0


class SameOrigin:
    """Answers only what this very page asks. The page can start processes, and any site that is open in the same browser can
    send requests to 127.0.0.1: under another name that leads here (DNS rebinding), or from its own scripts and forms."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] in ("http", "websocket"):
            said = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            host = said.get("host", "")
            if (host.rpartition(":")[0] or host) not in ("127.0.0.1", "localhost") \
                    or said.get("origin", f"http://{host}") != f"http://{host}" \
                    or said.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                await PlainTextResponse("only this page itself may ask", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)
