"""What a batch file is answered by, and where the answers go."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import UserError
from common.flags import arg, meant
from llm.config.generation import OpenArguments
from llm.config.machine import check_alone


@dataclass
class BatchArguments:
    """Requests from a file, and how many of them are answered at a time."""

    input_file: str = arg(
        "",
        "requests, one a line: custom_id, method (POST), url (such as /v1/chat/completions), body",
        required=True,
    )
    output_file: str = arg(
        "",
        "answers, one a line; FILE.partial until all are there, from which the same command goes "
        "on after an early end",
        required=True,
    )
    error_file: str | None = arg(
        None,
        "requests that failed, in the same form; beside output_file, ending in .errors.jsonl, when "
        "not given",
    )
    api_url: str | None = arg(
        None,
        "address of a server that answers, such as http://127.0.0.1:8011, instead of a model here; "
        "the environment variable LLM_API_KEY carries its key",
    )
    concurrency: int = arg(
        16, "requests that are sent at a time", minimum=1, maximum=4096, only_with="api_url"
    )
    max_retries: int = arg(
        5,
        "how often a request is sent again that a server turned away for now (408, 429, 502, 503, "
        "504), or whose connection broke",
        minimum=0,
        maximum=100,
        only_with="api_url",
    )
    request_timeout_s: float = arg(
        3600.0, "seconds that an answer may take", minimum=0.001, only_with="api_url"
    )
    src_length: int = arg(1024, "longest prompt in tokens", minimum=1, not_with="api_url")
    max_length: int = arg(512, "most new tokens per request", minimum=1, not_with="api_url")
    model_id: str | None = arg(
        None, "what bodies call the model; its directory's name when not given", not_with="api_url"
    )
    max_num_seqs: int = arg(
        16,
        "requests that are answered together",
        minimum=1,
        maximum=1024,
        not_with="api_url",
    )
    max_num_batched_tokens: int = arg(
        512,
        "tokens of a step; longer prompts are cut into several",
        minimum=1,
        not_with="api_url",
    )

    def validate(self) -> None:
        """Refuse an address that is none, and several processes that would all ask it.

        Raises:
            UserError: names the value and the fix.
        """
        if self.api_url is None:
            return
        parts = urlsplit(self.api_url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise UserError(
                f"api_url={self.api_url} is no address of a server; give it as "
                "http://127.0.0.1:8011"
            )
        # Clients of OpenAI's API are given it with the version; urls of requests have it already.
        self.api_url = self.api_url.rstrip("/").removesuffix("/v1")
        check_alone("asking a server (--api_url)")

    @property
    def error_place(self) -> Path:
        """The file of requests that failed."""
        if self.error_file is not None:
            return Path(self.error_file)
        output = Path(self.output_file)
        return output.with_name(f"{output.name.removesuffix('.jsonl')}.errors.jsonl")


def check_one_answers(batch: BatchArguments, place: OpenArguments) -> None:
    """Refuse a server beside a model, and neither.

    Raises:
        UserError: names the flags.
    """
    model = place.model_name_or_path or place.model_dir
    if batch.api_url is None and model is None:
        raise UserError(
            "nobody answers: give --model_name_or_path DIR (or --model_dir DIR for an exported "
            "program), or --api_url of a server"
        )
    idle = sorted(meant(place))
    if batch.api_url is not None and idle:
        raise UserError(
            f"{', '.join(idle)} would have no effect: the server at {batch.api_url} answers with "
            "its own model; drop api_url or the other flags"
        )
