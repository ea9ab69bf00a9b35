"""Arguments of every script, in groups that scripts compose.

Names and meanings follow PaddleNLP's ``TrainingArguments`` and its Llama examples, so command lines
written for them keep working. Training has its own in :mod:`llm.config.training` and
:mod:`llm.config.finetune`.
"""

from dataclasses import dataclass

from llm.config.kernels import KernelArguments
from llm.config.loader import arg
from llm.errors import UserError

DEVICES = ("cpu", "gpu")


@dataclass
class SourceArguments(KernelArguments):
    """Which trained model to use, on which device."""

    model_name_or_path: str | None = arg(
        None, "model directory in the Hugging Face layout", aliases=("model_path",)
    )
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the model directory when not given"
    )
    device: str = arg("cpu", "where to run", choices=DEVICES)
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)
    dtype: str = arg(
        "float32",
        "type of weights and cache; bfloat16 on CPU needs the native ops",
        choices=("float32", "bfloat16", "float16"),
    )

    def validate(self) -> None:
        """Refuse a missing model, types that the device lacks, and unknown ops.

        Raises:
            UserError: the message names the flag and the fix.
        """
        super().validate()
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is needed: the directory of a trained model")
        if self.dtype == "float16" and self.device == "cpu":
            raise UserError("dtype=float16 needs a GPU; a CPU computes in float32 or bfloat16")


@dataclass
class PromptArguments:
    """What to ask and how to answer."""

    prompt: list[str] | None = arg(None, "one or more prompts")
    data_file: str | None = arg(
        None, "prompts from a .json list or .jsonl: strings, or objects with prompt, src or text"
    )
    output_file: str | None = arg(None, "write answers here as jsonl")
    chat: bool = arg(False, "wrap prompts in the chat template; without prompts, chat on stdin")
    batch_size: int = arg(8, "prompts generated together", minimum=1)


@dataclass
class SamplingArguments:
    """How the next token is chosen, and how much is generated."""

    src_length: int | None = arg(
        None, "longest prompt in tokens; what the context leaves when not given", minimum=1
    )
    max_length: int = arg(
        128, "most new tokens", minimum=1, aliases=("max_new_tokens", "tgt_length")
    )
    decode_strategy: str = arg(
        "greedy_search", "greedy_search ignores temperature", choices=("greedy_search", "sampling")
    )
    temperature: float = arg(1.0, "0 is greedy", minimum=0, maximum=100)
    top_k: int = arg(0, "sample among the k likeliest; 0 is off", minimum=0)
    top_p: float = arg(1.0, "sample in the likeliest mass p", minimum=0, maximum=1)
    repetition_penalty: float = arg(1.0, "above 1 discourages tokens seen", minimum=0.01)
    seed: int = arg(42, "seed of sampling", minimum=0)
    ignore_eos: bool = arg(False, "go on past the end-of-sequence token")


@dataclass
class ExportArguments:
    """Where the static program goes."""

    output_path: str = arg("inference/llama", "directory and file prefix of the program")
    block_size: int = arg(16, "tokens per cache block", minimum=1)
    max_model_len: int | None = arg(
        None, "longest prompt plus answer; the model's max_position_embeddings", minimum=2
    )
    check: bool = arg(
        True, "compare the program with the network, token by token, in a fresh process"
    )


@dataclass
class ProgramArguments:
    """Which exported program to run."""

    model_dir: str = arg("inference", "directory of the exported program")
    model_prefix: str = arg("llama", "file prefix of the exported program")
    tokenizer_name_or_path: str | None = arg(
        None, "tokenizer directory or file; the one beside the program when not given"
    )
    device: str = arg("cpu", "where to run", choices=DEVICES)
    threads: int | None = arg(None, "CPU threads; all cores when not given", minimum=1)
    cache_blocks: int | None = arg(
        None, "cache blocks; enough for the batch when not given", minimum=1
    )


@dataclass
class ServerArguments:
    """What the HTTP API and the chat page listen on, and the limits of a request."""

    port: int = arg(8010, "port of the chat page", minimum=0, maximum=65535)
    flask_port: int = arg(8011, "port of the HTTP API", minimum=0, maximum=65535)
    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    src_length: int = arg(1024, "longest prompt in tokens", minimum=1)
    max_length: int = arg(512, "most new tokens per request", minimum=1)
    no_ui: bool = arg(False, "API only; gradio is not imported")
    title: str = arg("Llama on Paddle", "title of the chat page")
    model_id: str | None = arg(None, "name in /v1/models; the exported model's name")
    max_body_bytes: int = arg(1 << 20, "largest request body", minimum=1024)
    max_queue: int = arg(16, "requests that may wait; more get status 503", minimum=0, maximum=1024)
    chat_template: str | None = arg(
        None,
        "llama2, llama3, simple, or a Jinja file, in place of the model's own template",
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
