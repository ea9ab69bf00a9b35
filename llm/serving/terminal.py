"""From prompts to answers on a terminal: what predict and infer share."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from common import jsonl
from common.errors import UserError
from common.files import check_target
from data.tokenizer import Tokenizer, check_vocabulary
from llm.config.generation import PromptArguments, SamplingArguments
from llm.engine.engine import Engine
from llm.engine.sequence import Completion, SamplingParams, Step

_TEXT_KEYS = ("prompt", "src", "text")


@dataclass(frozen=True)
class Console:
    """The terminal. Of processes that answer together, one has it.

    Args:
        speaks: whether this process is the one.
        share: hands the line of that one to all; every process calls it.
    """

    speaks: bool = True
    share: Callable[[str], str] = str

    def write(self, text: str) -> None:
        """Write to standard output."""
        if self.speaks:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Write to standard error."""
        if self.speaks:
            sys.stderr.write(text)
            sys.stderr.flush()

    def read_line(self) -> str:
        """Read from standard input; nothing at its end."""
        return self.share(sys.stdin.readline() if self.speaks else "")


@dataclass(frozen=True)
class Source:
    """A model that can answer: its context, its tokenizer, and how to open an engine on it."""

    tokenizer: Tokenizer
    vocab_size: int
    context: int
    open_engine: Callable[..., Engine]  # (max_sequences, max_tokens)
    console: Console = Console()


def _item_text(item: object, where: str) -> str:
    if isinstance(item, dict):
        found = [key for key in _TEXT_KEYS if key in item]
        if not found:
            raise UserError(f"{where}: no key among {', '.join(_TEXT_KEYS)} in {list(item)}")
        item = item[found[0]]
    if not isinstance(item, str) or not item:
        raise UserError(f"{where}: the prompt has to be non-empty text, not {item!r:.40}")
    return item


def read_prompts(args: PromptArguments) -> list[str]:
    """Return the prompts of ``--prompt`` and ``--data_file`` in order.

    Raises:
        UserError: an unreadable file, an item that is no prompt, by file and line, or an
            ``--output_file`` that the answers could not be written to.
    """
    if args.output_file is not None:
        check_target(args.output_file, "output_file")
    prompts = [_item_text(prompt, "--prompt") for prompt in args.prompt or []]
    if args.data_file is not None:
        items = [_item_text(item, str(place)) for place, item in jsonl.read(args.data_file)]
        if not items:
            raise UserError(f"data_file {args.data_file} has no prompts")
        prompts += items
    return prompts


def sampling_params(args: SamplingArguments, index: int = 0) -> SamplingParams:
    """Translate flags; each prompt of a batch gets a random stream of its own."""
    greedy = args.decode_strategy == "greedy_search"
    return SamplingParams(
        max_new_tokens=args.max_length,
        temperature=0.0 if greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed + index,
        ignore_eos=args.ignore_eos,
    )


class Conversation:
    """Encodes prompts, plain or through the chat template, within the model's context."""

    def __init__(self, source: Source, sampling: SamplingArguments, chat: bool) -> None:
        check_vocabulary(source.tokenizer, source.vocab_size)
        self.tokenizer = source.tokenizer
        self.chat = chat
        room = source.context - sampling.max_length
        if room < 1:
            raise UserError(
                f"max_length={sampling.max_length} leaves no room for a prompt in the model's "
                f"context of {source.context} tokens"
            )
        self.limit = min(sampling.src_length or room, room)

    def encode(self, prompt: str | list[dict[str, str]], name: str = "the prompt") -> list[int]:
        """Return the ids of a prompt or of a conversation's messages.

        Raises:
            UserError: more tokens than src_length or the context allow.
        """
        if isinstance(prompt, list):
            ids = self.tokenizer.apply_chat_template(prompt)
        elif self.chat:
            ids = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        else:
            ids = self.tokenizer.encode(prompt, add_bos=True)
        if len(ids) > self.limit:
            raise UserError(
                f"{name} has {len(ids)} tokens, the limit is {self.limit} (src_length, or what "
                "the context leaves beside max_length); shorten it or raise --src_length"
            )
        return ids

    def text(self, completion: Completion) -> str:
        """Return an answer's text without control tokens."""
        return self.tokenizer.decode(completion.ids)


class _Printer:
    """Writes one answer to the terminal as it grows."""

    def __init__(self, source: Source) -> None:
        self._decoder, self._console = source.tokenizer.stream(), source.console

    def __call__(self, _: int, step: Step) -> None:
        text = "" if step.finish_reason == "stop" else self._decoder.push(step.token_id)
        if step.finish_reason:
            text += self._decoder.finish() + "\n"
        self._console.write(text)


def answer_prompts(
    source: Source, prompts: list[str], args: PromptArguments, sampling: SamplingArguments
) -> list[Completion]:
    """Generate, print, and write ``--output_file``; all prompts are checked before any runs."""
    conversation = Conversation(source, sampling, args.chat)
    ids = [conversation.encode(p, f"prompt {n}") for n, p in enumerate(prompts, 1)]
    longest = max(map(len, ids)) + sampling.max_length
    engine = source.open_engine(
        max_sequences=min(args.batch_size, len(prompts)), max_tokens=longest
    )
    params = [sampling_params(sampling, index) for index in range(len(prompts))]
    start = time.perf_counter()
    if len(prompts) == 1:
        completions = engine.generate(ids, params, _Printer(source))
    else:
        quiet = None if source.console.speaks else True
        with tqdm(total=len(prompts), desc="answers", disable=quiet, leave=False) as bar:
            completions = engine.generate(
                ids, params, lambda _, step: bar.update(step.finish_reason is not None)
            )
        for prompt, completion in zip(prompts, completions, strict=True):
            source.console.write(f"> {prompt}\n{conversation.text(completion)}\n\n")
    seconds = time.perf_counter() - start
    generated = sum(len(completion.ids) for completion in completions)
    source.console.note(
        f"{generated} tokens in {seconds:.2f} s, {generated / seconds:.1f} tokens/s\n"
    )
    if args.output_file is not None and source.console.speaks:
        rows = [
            {
                "prompt": prompt,
                "output": conversation.text(completion),
                "ids": completion.ids,
                "prompt_ids": prompt_ids,
                "finish_reason": completion.finish_reason,
            }
            for prompt, prompt_ids, completion in zip(prompts, ids, completions, strict=True)
        ]
        jsonl.write(args.output_file, rows)
    return completions


def chat_on_stdin(source: Source, sampling: SamplingArguments, chat: bool) -> None:
    """Talk turn by turn; the chat template carries the history. End of input ends it."""
    conversation = Conversation(source, sampling, chat)
    engine = source.open_engine(
        max_sequences=1, max_tokens=conversation.limit + sampling.max_length
    )
    console = source.console
    interactive = console.speaks and sys.stdin.isatty()
    if interactive:
        console.note("Type a prompt; /reset forgets the conversation, /exit ends.\n")
    messages: list[dict[str, str]] = []
    while True:
        if interactive:
            console.note("> ")
        line = console.read_line()
        text = line.rstrip("\n")
        if not line or text == "/exit":
            return
        if text == "/reset":
            messages = []
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = conversation.encode(messages if chat else text)
        except UserError as error:
            # One prompt too long should not end a conversation.
            console.note(f"error: {error}\n")
            messages.pop()
            continue
        completion = engine.generate([ids], sampling_params(sampling), _Printer(source))
        messages.append({"role": "assistant", "content": conversation.text(completion[0])})
