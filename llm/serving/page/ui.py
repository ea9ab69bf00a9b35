"""The chat page: Gradio in front of the API, over HTTP only.

    python -m llm.serving.page.ui --api_url http://127.0.0.1:8011 --port 8010

The page needs nothing from the internet: system fonts, no analytics, and a content security policy
under which a browser does not load pictures or scripts from elsewhere, not even when the model's
answer asks for it.
"""

from common.ending import run_script  # isort: split

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import contextlib
import hmac
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

from common.flags import load
from llm import runtime
from llm.config.serving import ChatPageArguments
from llm.serving.page.client import ApiDownError, ChatClient
from llm.serving.wsgi import listen, local_url


@contextlib.contextmanager
def _without_type_stubs() -> Iterator[None]:
    """Keep gradio from writing .pyi files beside its sources, which is half of its import's time.

    It writes none for a class that is in no file (gradio/component_meta.py).
    """
    real = inspect.getfile

    def getfile(what: Any) -> str:
        if isinstance(what, type) and what.__module__.startswith("gradio."):
            raise OSError("a page needs no type stubs")
        return real(what)

    with mock.patch.object(inspect, "getfile", getfile):
        yield


with runtime.fast_imports(), _without_type_stubs():
    import gradio as gr

_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; "
    "connect-src 'self' ws: blob: data:; frame-ancestors 'self'"
)
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_CONCURRENT_CHATS = 16
_CSS = """
.gradio-container {width: 100% !important; max-width: 1000px !important; margin: 0 auto !important}
#status p {opacity: 0.75; font-size: 0.9em; margin: 0}
#message button {
    background: var(--button-primary-background-fill); color: var(--button-primary-text-color);
    padding: 6px 16px; border-radius: 8px; font-weight: 600;
}
#message button.stop-button {background: var(--body-text-color); color: var(--body-background-fill)}
"""

History = list[dict[str, Any]]


class _PolicyMiddleware:
    """Adds the content security policy to every response (plain ASGI, so streams pass through)."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy)


def _text(content: Any) -> str:
    """Return a message's text; Gradio keeps contents as lists of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _until_question(history: History, index: int) -> History:
    """Return the history up to and with the user's message at or before ``index``."""
    while index >= 0 and history[index]["role"] != "user":
        index -= 1
    return history[: index + 1]


def _is_unanswered(history: History) -> bool:
    return bool(history) and history[-1]["role"] == "user"


@dataclass
class _Turn:
    """One question that is being answered."""

    stop: threading.Event = field(default_factory=threading.Event)
    cleared: bool = False


class ChatPage:
    """The page's components and what they do.

    Args:
        client: talks to the API.
        title: heading of the page.
    """

    def __init__(self, client: ChatClient, title: str) -> None:
        self._client = client
        self._turns: dict[str | None, _Turn] = {}  # by browser tab
        with gr.Blocks(title=title, fill_height=True, analytics_enabled=False) as self.blocks:
            gr.Markdown(f"# {title}")
            self.status = gr.Markdown("Asking the API for its model …", elem_id="status")
            self.chat = gr.Chatbot(
                show_label=False,
                scale=1,
                height=None,
                min_height=320,
                elem_id="chat",
                buttons=["copy", "copy_all"],
                placeholder="Ask something.",
                feedback_options=None,
            )
            self.message = gr.Textbox(
                show_label=False,
                placeholder="Message",
                lines=1,
                max_lines=8,
                autofocus=True,
                submit_btn="Send",
                elem_id="message",
            )
            self._settings()
            self._connect()

    def _settings(self) -> None:
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.system = gr.Textbox(
                "", label="System prompt", lines=2, placeholder="None", elem_id="system"
            )
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, 0.7, step=0.05, label="Temperature", info="0: always the likeliest token"
                )
                self.max_tokens = gr.Slider(
                    1, 512, 128, step=1, label="Longest answer", info="In tokens"
                )

    def _connect(self) -> None:
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        both = [self.message, self.chat]
        answer = {
            "fn": self.answer,
            "inputs": [self.chat, self.system, self.temperature, self.max_tokens],
            "outputs": both,
            "show_progress": "hidden",
            "concurrency_limit": _CONCURRENT_CHATS,
            "api_visibility": "private",
        }
        asked = self.message.submit(self.ask, both, both, **quiet)
        retried = self.chat.retry(self.retry, self.chat, both, **quiet)
        for event in (asked, retried):
            event.success(**answer).then(self.idle, None, self.message, **quiet)
        # Not through Gradio's `cancels`: an update under way when it strikes ends in an error that
        # covers the conversation.
        self.message.stop(self.stop, None, None, **quiet)
        self.chat.clear(self.clear, None, both, **quiet)
        self.chat.undo(self.undo, self.chat, both, **quiet)
        self.blocks.load(self.refresh, None, [self.status, self.max_tokens, self.system], **quiet)
        self.blocks.unload(self.stop)

    def ask(self, message: str, history: History, request: gr.Request) -> tuple[Any, Any]:
        """Put the user's message into the conversation and show the stop button."""
        if not message.strip() or request.session_hash in self._turns:
            return gr.skip(), gr.skip()
        return self._begin(request), [*history, {"role": "user", "content": message}]

    def retry(
        self, history: History, which: gr.RetryData, request: gr.Request
    ) -> tuple[Any, History]:
        """Take the answer back, to ask the same question again."""
        return self._begin(request), _until_question(history, int(which.index))

    def undo(self, history: History, which: gr.UndoData) -> tuple[Any, History]:
        """Take the last question and its answer back; the question may be edited."""
        return self._give_back(_until_question(history, int(which.index)))

    def stop(self, request: gr.Request) -> None:
        """End the running answer; what has come stays."""
        turn = self._turns.get(request.session_hash)
        if turn is not None:
            turn.stop.set()

    def clear(self, request: gr.Request) -> tuple[Any, History]:
        """Empty the conversation, also while an answer comes in."""
        turn = self._turns.get(request.session_hash)
        if turn is not None:
            turn.cleared = True
            turn.stop.set()
        return self._idle_box(), []

    def idle(self, request: gr.Request) -> Any:
        """Show the send button, unless an answer is coming in."""
        return gr.skip() if request.session_hash in self._turns else self._idle_box()

    def answer(
        self,
        history: History,
        system: str,
        temperature: float,
        max_tokens: int,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any]]:
        """Stream the answer to the conversation's last message into it.

        Failures are shown as warnings: Gradio's errors would cover the conversation.
        """
        turn = self._turns.get(request.session_hash)
        if turn is None or not _is_unanswered(history):
            return
        messages = [{"role": m["role"], "content": _text(m["content"])} for m in history]
        if system.strip():
            messages.insert(0, {"role": "system", "content": system})
        answer = ""
        try:
            for delta in self._client.stream(
                messages, temperature=temperature, max_tokens=int(max_tokens), stop=turn.stop
            ):
                answer += delta
                yield gr.skip(), [*history, {"role": "assistant", "content": answer}]
            if not answer and not turn.stop.is_set():
                gr.Info("The model ended its answer at once.", title="Empty answer")
        except ApiDownError as error:
            gr.Warning(str(error), title="No answer")
        finally:
            self._turns.pop(request.session_hash, None)
        if turn.cleared:
            yield self._idle_box(), []
        elif not answer:
            yield self._give_back(history)

    def refresh(self) -> tuple[Any, Any, Any]:
        """Show which model answers, and the limits it allows."""
        try:
            model = self._client.model()
        except ApiDownError as error:
            return gr.Markdown(f"**{error}**"), gr.Slider(), gr.Textbox()
        status = f"Model: **{model.id}**"
        if not model.has_chat_template:
            status += " · no chat template: it continues your text instead of answering"
        limit = model.max_new_tokens
        slider = gr.Slider(maximum=limit, value=min(128, limit))
        return gr.Markdown(status), slider, gr.Textbox(visible=model.has_chat_template)

    def _give_back(self, history: History) -> tuple[Any, History]:
        """Move the last question from the conversation to the text box."""
        question = _text(history[-1]["content"]) if history else ""
        return gr.Textbox(value=question, submit_btn="Send", stop_btn=False), history[:-1]

    def _begin(self, request: gr.Request) -> Any:
        self._turns[request.session_hash] = _Turn()
        return gr.Textbox(value="", submit_btn=False, stop_btn="Stop")

    def _idle_box(self) -> Any:
        return gr.Textbox(submit_btn="Send", stop_btn=False)


def launch(arguments: ChatPageArguments, api_key: str | None) -> None:
    """Serve the page until interrupted, or until stdin closes where that is asked for.

    With a key, the page asks for it as a password: otherwise it would be a way around the key.

    Raises:
        UserError: the port is in use.
    """
    listen(arguments.host, arguments.port, "port").close()
    page = ChatPage(ChatClient(arguments.api_url, api_key), arguments.title)

    def may_enter(user: str, password: str) -> bool:
        return hmac.compare_digest(password.encode(), (api_key or "").encode())

    page.blocks.queue(api_open=False).launch(
        server_name=arguments.host,
        server_port=arguments.port or None,
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        auth=may_enter if api_key else None,
        auth_message="The password is the server's API key; any user name will do.",
        theme=gr.themes.Soft(font=_FONTS, font_mono=_MONO),
        css=_CSS,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(_PolicyMiddleware)]},
    )
    url = local_url(arguments.host, page.blocks.server_port)
    sys.stderr.write(f"chat page ready: {url}\n")
    try:
        if arguments.until_stdin_closes:
            sys.stdin.buffer.read()
        else:
            page.blocks.block_thread()
    finally:
        page.blocks.close(verbose=False)


def main() -> None:
    """Read the arguments and serve the page."""
    (arguments,) = load((ChatPageArguments,), prog="llm.serving.page.ui", description=__doc__ or "")
    launch(arguments, os.environ.get("LLM_API_KEY") or None)


if __name__ == "__main__":
    run_script(main)
