"""The arguments of the server and of the chat page."""

import pytest

from common.errors import UserError
from common.flags import load
from llm.config.serving import API_KEY_VARIABLE, ChatPageArguments, ServerArguments
from llm.serving.listening import listen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "9000", "--flask_port", "9000"], "port and flask_port are both 9000"),
        (["--port", "70000"], "the maximum is 65535"),
        (["--max_queue", "-1"], "the minimum is 0"),
        (["--max_queue", "5000"], "the maximum is 4096"),
        (["--src_len", "5"], "did you mean 'src_length'"),
        (["--root_path", "chat"], "root_path='chat' is no path such as /chat"),
        (["--root_path", "/a b"], "leave it out"),
        (["--api_key="], "api_key is empty, so no request could carry it"),
        (["--api_key", "schlüssel"], "api_key has characters other than visible ASCII"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load((ServerArguments,), flags, prog="server.py")


def test_a_key_whose_variable_is_empty_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``LLM_API_KEY=$KEY`` where KEY is not set."""
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(UserError, match="LLM_API_KEY is empty"):
        load((ServerArguments,), [], prog="server.py")
    monkeypatch.setenv(API_KEY_VARIABLE, "from-there")
    assert load((ServerArguments,), [], prog="server.py")[0].key == "from-there"
    assert load((ServerArguments,), ["--api_key", "x"], prog="server.py")[0].key == "x"


def test_a_host_that_is_not_this_machine() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 203\.0\.113\.1, flask_port=0"):
        listen("203.0.113.1", 0, "flask_port")


def test_sub_paths() -> None:
    for path in ("/chat", "/a/b-c/", ""):
        load((ChatPageArguments,), [f"--root_path={path}"], prog="llm.serving.page.ui")
    with pytest.raises(UserError, match="is no path"):
        load((ChatPageArguments,), ["--root_path=/"], prog="llm.serving.page.ui")
