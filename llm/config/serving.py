"""What servers and chat pages listen on, and the limits of a request."""

from dataclasses import dataclass

from common.errors import UserError
from common.flags import arg


@dataclass
class ServerArguments:
    """What the HTTP API and the chat page listen on, and the limits of a request."""

    port: int = arg(8010, "port of the chat page", minimum=0, maximum=65535, not_with="no_ui")
    flask_port: int = arg(8011, "port of the HTTP API", minimum=0, maximum=65535)
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    src_length: int = arg(1024, "longest prompt in tokens", minimum=1)
    max_length: int = arg(512, "most new tokens per request", minimum=1)
    no_ui: bool = arg(False, "API only; gradio is not imported")
    title: str = arg("Llama on Paddle", "title of the chat page", not_with="no_ui")
    model_id: str | None = arg(None, "name in /v1/models; the exported model's name")
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
    max_queue: int = arg(
        100, "requests that may wait; more get status 503", minimum=0, maximum=4096
    )
    api_key: str | None = arg(
        None,
        "key that requests must carry, and password of the chat page; the environment variable "
        "LLM_API_KEY keeps it out of the process list",
    )

    def validate(self) -> None:
        """Refuse two servers on one port.

        Raises:
            UserError: the message names the flags and the fix.
        """
        if not self.no_ui and self.port == self.flask_port != 0:
            raise UserError(
                f"port and flask_port are both {self.port}; give the chat page and the API "
                "different ports, or use --no_ui"
            )


@dataclass
class ChatPageArguments:
    """The chat page alone, in front of an API that runs elsewhere."""

    api_url: str = arg("http://127.0.0.1:8011", "address of the API")
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = arg(8010, "port of the chat page", minimum=0, maximum=65535)
    title: str = arg("Llama on Paddle", "title of the chat page")
    until_stdin_closes: bool = arg(False, "end with the process that holds this one's stdin")
