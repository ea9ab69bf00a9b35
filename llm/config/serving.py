"""What servers and chat pages listen on, and the limits of a request."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from common.errors import UserError
from common.flags import arg
from common.foreign import Program
from llm.config import mindie, paddlenlp_models
from llm.config.operation import OperationArguments

API_KEY_VARIABLE = "LLM_API_KEY"
_ROOT_PATH = "path under which a proxy shows the chat page, such as /chat"

# What clients send where nobody has set a model: FastDeploy's samples, PaddleNLP's, TGI's clients.
ANY_MODEL = ("default", "null", "paddlenlp", "tgi", "dummy")


@dataclass
class ServerArguments(OperationArguments):
    """What the HTTP API and the chat page listen on, and the limits of a request."""

    FOREIGN: ClassVar[tuple[Program, ...]] = (paddlenlp_models.SERVE,)

    config: str | None = arg(
        None,
        "config.json of MindIE, whose settings count as flags; those of the command line go first",
        reader=mindie.settings,
    )
    port: int = arg(8010, "port of the chat page", minimum=0, maximum=65535, not_with="no_ui")
    flask_port: int = arg(8011, "port of the HTTP API", minimum=0, maximum=65535)
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    src_length: int = arg(1024, "longest prompt in tokens", minimum=1)
    max_length: int = arg(512, "most new tokens per request", minimum=1)
    max_model_len: int | None = arg(
        None,
        "most tokens of a prompt and its answer together; what src_length and max_length, and the "
        "model's context, allow when not given",
        minimum=2,
    )
    no_ui: bool = arg(False, "API only; gradio is not imported")
    title: str = arg("Llama on Paddle", "title of the chat page", not_with="no_ui")
    root_path: str = arg("", _ROOT_PATH, not_with="no_ui")
    model_id: str | None = arg(None, "name in /v1/models; the exported model's name")
    model_alias: list[str] = arg(
        [], "further names by which requests may ask for the model, also in /v1/models"
    )
    strict_model_name: bool = arg(
        False,
        "refuse the names that clients send where nobody has set one: " + ", ".join(ANY_MODEL),
    )
    tool_call_parser: str = arg(
        "auto",
        "how the model writes calls of tools: hermes (<tool_call>), llama3_json, pythonic; auto "
        "goes by its chat template",
        choices=("auto", "hermes", "llama3_json", "pythonic"),
    )
    max_body_bytes: int = arg(1 << 20, "largest request body", minimum=1024)
    max_num_seqs: int = arg(
        16, "requests that are answered together; more wait", minimum=1, maximum=1024
    )
    max_num_batched_tokens: int = arg(
        512, "tokens of a step; longer prompts are cut into several", minimum=1
    )
    max_queue_delay_microseconds: int = arg(
        0,
        "how long an idle engine waits for further requests before it begins the first, while "
        "there is room for them; requests that come together share their steps",
        minimum=0,
        maximum=10_000_000,
    )
    drain_seconds: float = arg(
        25.0,
        "how long answers that run may take to end after SIGTERM; Paddle's launcher kills after 30",
        minimum=0,
        maximum=86400,
    )
    max_queue: int = arg(
        100, "requests that may wait; more get status 503", minimum=0, maximum=4096
    )
    ssl_certfile: str | None = arg(
        None, "certificate of the server in PEM, with those between it and its authority: TLS"
    )
    ssl_keyfile: str | None = arg(None, "its private key in PEM, if that lies elsewhere")
    ssl_ca_certs: str | None = arg(
        None, "authorities in PEM; clients need a certificate of one of them"
    )
    ssl_crl: str | None = arg(None, "list in PEM of clients' certificates that are revoked")

    @property
    def any_names(self) -> tuple[str, ...]:
        """Names that mean the model because they are sent where nobody has set one."""
        return () if self.strict_model_name else ANY_MODEL

    @property
    def key(self) -> str | None:
        """The key, wherever it was given."""
        return os.environ.get(API_KEY_VARIABLE) if self.api_key is None else self.api_key

    def without_effect(self) -> Iterable[str]:
        """Return lines about settings of another server's file that change nothing here."""
        return () if self.config is None else mindie.without_effect(self.config)

    def validate(self) -> None:
        """Refuse two servers on one port, a sub-path that is none, and a key that nobody can send.

        Raises:
            UserError: the message names the flags and the fix.
        """
        super().validate()
        _check_root_path(self.root_path)
        _check_key(self.key, API_KEY_VARIABLE if self.api_key is None else "api_key")
        taken = {self.flask_port} if self.no_ui else {self.flask_port, self.port}
        if self.management_port and self.management_port in taken:
            raise UserError(
                f"management_port={self.management_port} is the API's or the chat page's port; "
                "give management one of its own"
            )
        if not self.no_ui and self.port == self.flask_port != 0:
            raise UserError(
                f"port and flask_port are both {self.port}; give the chat page and the API "
                "different ports, or use --no_ui"
            )
        for name, needed in (
            ("ssl_keyfile", "ssl_certfile"),
            ("ssl_ca_certs", "ssl_certfile"),
            ("ssl_crl", "ssl_ca_certs"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise UserError(
                    f"{name}={getattr(self, name)} says nothing without --{needed}; give both"
                )
        if self.ssl_ca_certs is not None and not self.no_ui:
            raise UserError(
                f"ssl_ca_certs={self.ssl_ca_certs}: the chat page cannot ask browsers for "
                "certificates, and would be a way around them; use --no_ui, and put the page "
                "behind a proxy that asks (python -m llm.serving.page.ui)"
            )


@dataclass
class ChatPageArguments:
    """The chat page alone, in front of an API that runs elsewhere."""

    api_url: str = arg("http://127.0.0.1:8011", "address of the API")
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = arg(8010, "port of the chat page", minimum=0, maximum=65535)
    title: str = arg("Llama on Paddle", "title of the chat page")
    root_path: str = arg("", _ROOT_PATH)
    api_certificate: str | None = arg(
        None, "take the API's certificate if it is this one, in PEM, by whatever name it is reached"
    )
    ssl_certfile: str | None = arg(None, "certificate of the page in PEM: TLS")
    ssl_keyfile: str | None = arg(None, "its private key in PEM, if that lies elsewhere")
    until_stdin_closes: bool = arg(False, "end with the process that holds this one's stdin")

    def validate(self) -> None:
        """Refuse a sub-path that is none.

        Raises:
            UserError: the message names the flag and the fix.
        """
        _check_root_path(self.root_path)


def _check_key(key: str | None, where: str) -> None:
    """Refuse what no header carries; an empty one, of a variable that is not set, opens the API."""
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        said = "is empty" if not key else "has characters other than visible ASCII"
        raise UserError(
            f"{where} {said}, so no request could carry it; give it a key (openssl rand -hex 24 "
            "makes one), or leave it out to serve without"
        )


def _check_root_path(root_path: str) -> None:
    if root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", root_path):
        raise UserError(
            f"root_path={root_path!r} is no path such as /chat: a slash, then letters, digits "
            "and -._~; without one, leave it out"
        )
