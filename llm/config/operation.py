"""Who may ask a server for how much, what it logs, and the port for those who run it."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import UserError
from common.flags import arg
from llm.parallel.rules import launched


@dataclass
class OperationArguments:
    """Keys, origins, logs, and the port of management."""

    api_key: str | None = arg(
        None,
        "key that requests must carry; the chat page asks for it; the environment variable "
        "LLM_API_KEY keeps it out of the process list",
    )
    api_keys: str | None = arg(
        None,
        "YAML or JSON lines of keys with a name, key or sha256, requests_per_minute and "
        "tokens_per_minute; read again on SIGHUP",
    )
    cors_origins: list[str] = arg(
        [],
        "origins such as https://chat.example.com whose pages may use the API from a browser; "
        "* for all",
        aliases=("allowed_origins",),
    )
    access_log: str | None = arg(
        None, "file that gets a line of JSON for each request; - for standard output"
    )
    log_texts: bool = arg(
        False, "the access log has what was asked and answered, too", only_with="access_log"
    )
    management_port: int | None = arg(
        None,
        "port of /health, /metrics and adapters' routes; /metrics leaves the API's port then",
        minimum=0,
        maximum=65535,
    )
    management_host: str = arg(
        "127.0.0.1", "address of that port, which asks for no key", only_with="management_port"
    )
    adapter_dir: str | None = arg(
        None,
        "directory below which adapters may be loaded while the server runs, by "
        "/v1/load_lora_adapter on the management port",
        only_with="management_port",
    )

    def validate(self) -> None:
        """Refuse origins that no browser sends, and what several processes cannot do.

        Raises:
            UserError: names the value and the fix.
        """
        for origin in self.cors_origins:
            if origin != "*" and not _is_origin(origin):
                raise UserError(
                    f"cors_origins: {origin!r} has to be * or scheme://host[:port] in small "
                    "letters, without a path, such as https://chat.example.com"
                )
        if "*" in self.cors_origins and len(self.cors_origins) > 1:
            raise UserError(
                f"cors_origins={' '.join(self.cors_origins)}: * stands for all origins; give it "
                "alone, or drop it"
            )
        if self.adapter_dir is not None and launched() > 1:
            raise UserError(
                f"adapter_dir={self.adapter_dir} works in one process, and {launched()} were "
                "launched; drop the flag"
            )


def _is_origin(word: str) -> bool:
    try:
        parts = urlsplit(word)
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return False
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return bool(host) and "*" not in host and word == f"{parts.scheme}://{host}{port}"
