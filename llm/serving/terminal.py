"""From prompts to answers on a terminal: what predict and infer share."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm

from common import jsonl
from common.errors import UserError
from common.files import check_target
from common.results import Journal
from data.tokenization.stream import StreamDecoder
from llm.config.generation import OpenArguments, PromptArguments, SamplingArguments
from llm.engine.beam import BeamParams
from llm.engine.finding import find_model
from llm.engine.offline import LLM, Answer, Prompt
from llm.engine.opening import OpenedModel, open_model
from llm.engine.request import SamplingParams, Token

_TEXT_KEYS = ("prompt", "src", "text")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


@dataclass(frozen=True)
class Asked:
    """A prompt, and which of ``--adapters`` is to answer it."""

    text: str
    adapter: str | None = None


def _asked(item: object, where: str, adapter: str | None) -> Asked:
    if isinstance(item, dict) and item.get("adapter") is not None:
        adapter = item["adapter"]
        if not isinstance(adapter, str):
            raise UserError(f"{where}: adapter has to be a name, not {adapter!r:.40}")
    return Asked(_item_text(item, where), adapter)


def _item_text(item: object, where: str) -> str:
    if isinstance(item, dict):
        found = [key for key in _TEXT_KEYS if key in item]
        if not found:
            raise UserError(f"{where}: no key among {', '.join(_TEXT_KEYS)} in {list(item)}")
        item = item[found[0]]
    if not isinstance(item, str) or not item:
        raise UserError(f"{where}: the prompt has to be non-empty text, not {item!r:.40}")
    return item


def read_prompts(args: PromptArguments) -> list[Asked]:
    """Return the prompts of ``--prompt`` and ``--data_file`` in order.

    Raises:
        UserError: an unreadable file, an item that is no prompt, by file and line, or an
            ``--output_file`` that the answers could not be written to.
    """
    if args.output_file is not None:
        check_target(args.output_file, "output_file")
    prompts = [_asked(prompt, "--prompt", args.adapter) for prompt in args.prompt or []]
    if args.data_file is not None:
        items = [
            _asked(item, str(place), args.adapter) for place, item in jsonl.read(args.data_file)
        ]
        if not items:
            raise UserError(f"data_file {args.data_file} has no prompts")
        prompts += items
    return prompts


def beam_params(args: SamplingArguments) -> BeamParams | None:
    """Translate flags; None where no beams are followed."""
    if args.decode_strategy != "beam_search" or args.num_beams is None:
        return None
    return BeamParams(
        args.num_beams, args.max_length, args.length_penalty, args.early_stopping, args.ignore_eos
    )


def sampling_params(args: SamplingArguments, index: int = 0) -> SamplingParams:
    """Translate flags; each prompt of a batch gets a random stream of its own."""
    greedy = args.decode_strategy != "sampling"
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

    def __init__(self, model: OpenedModel, sampling: SamplingArguments, chat: bool) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.chat = chat
        room = model.context - sampling.max_length
        if room < 1:
            raise UserError(
                f"max_length={sampling.max_length} leaves no room for a prompt in the model's "
                f"context of {model.context} tokens; lower it"
            )
        self._room = room
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
            ids = self.tokenizer.encode_prompt(prompt)
        if len(ids) > self.limit:
            fits = self.model.context - len(ids)
            cure = (
                "raise --src_length" if self.limit < self._room else f"lower --max_length to {fits}"
            )
            raise UserError(
                f"{name} has {len(ids)} tokens, the limit is {self.limit} (src_length, or what "
                "the context leaves beside max_length); shorten it"
                + (f" or {cure}" if fits > 0 else "")
            )
        return ids

    def prompt(self, ids: list[int], adapter: str | None = None) -> Prompt:
        """Return a prompt; a chat's answer begins anew, others go on with their prompt's text."""
        return Prompt(ids, () if self.chat else ids, adapter)


class _Printer:
    """Writes one answer to the terminal, as it grows where it does."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self._decoder, self._grown = decoder, False

    def grow(self, _: int, token: Token) -> None:
        """Take the next token."""
        self._grown = True
        text = "" if token.finish_reason == "stop" else self._decoder.push(token.token_id)
        if token.finish_reason:
            text += self._decoder.finish()
        _show(text)

    def end(self, answer: Answer) -> None:
        """Take the answer as a whole."""
        _show("\n" if self._grown else answer.text + "\n")


def _answer_one(llm: LLM, prompt: Prompt, params: SamplingParams | BeamParams) -> Answer:
    """Answer on the terminal, token by token where answers grow."""
    printer = _Printer(llm.model.decoder(prompt.before))
    grow = printer.grow if isinstance(params, SamplingParams) else None
    (answer,) = llm.generate([prompt], params, progress=False, on_token=grow)
    printer.end(answer)
    return answer


class _Answers:
    """Keeps each answer as it ends, then shows it; they are shown in the order of the prompts."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._texts: dict[int, str] = {}
        self._shown = 0
        self._journal: Journal | None = None

    @contextlib.contextmanager
    def kept_in(self, file: str | None) -> Iterator[None]:
        """Keep the answers in a file; where that ends early, say what is there."""
        with ExitStack() as stack:
            if file is not None:
                self._journal = stack.enter_context(Journal(file))
            total = len(self._prompts)
            try:
                yield
                if self._journal is not None:
                    self._journal.finish()
            except BaseException:
                if self._journal is not None and self._journal.count:
                    kept = f"{self._journal.count} of {total} answers are in {self._journal.place}"
                    _note(f"\nstopped: {kept}\n")
                raise

    def show(self, number: int, answer: Answer) -> None:
        """Keep an answer and show those whose turn it is."""
        self.keep(number, answer)
        self._texts[number] = answer.text
        while self._shown in self._texts:
            text = self._texts.pop(self._shown)
            with tqdm.external_write_mode(sys.stdout):
                _show(f"> {self._prompts[self._shown]}\n{text}\n\n")
            self._shown += 1

    def keep(self, number: int, answer: Answer) -> None:
        """Keep an answer."""
        if self._journal is not None:
            row = {
                "prompt": self._prompts[number],
                "output": answer.text,
                "ids": answer.ids,
                "prompt_ids": answer.prompt_ids,
                "finish_reason": answer.finish_reason,
            }
            self._journal.add(number, row)


def answer_prompts(
    model: OpenedModel, prompts: list[Asked], args: PromptArguments, sampling: SamplingArguments
) -> list[Answer]:
    """Generate, print, and write ``--output_file``; all prompts are checked before any runs."""
    conversation = Conversation(model, sampling, args.chat)
    texts = [one.text for one in prompts]
    ids = [conversation.encode(text, f"prompt {n}") for n, text in enumerate(texts, 1)]
    pairs = zip(ids, prompts, strict=True)
    asked = [conversation.prompt(one, prompt.adapter) for one, prompt in pairs]
    params = beam_params(sampling)
    each = [sampling_params(sampling, index) for index in range(len(prompts))]
    llm = LLM(
        model,
        max_num_seqs=args.batch_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    answers = _Answers(texts)
    start = time.perf_counter()
    with answers.kept_in(args.output_file):
        if len(asked) == 1:
            found = [_answer_one(llm, asked[0], params or each[0])]
            answers.keep(0, found[0])
        else:
            found = llm.generate(asked, params or each, progress=None, on_answer=answers.show)
    seconds = time.perf_counter() - start
    generated = sum(len(answer.ids) for answer in found)
    _note(
        f"{generated} tokens in {seconds:.2f} s, {generated / max(seconds, 1e-9):.1f} tokens/s, "
        "with the reading of the prompts\n"
    )
    return found


def chat_on_stdin(model: OpenedModel, args: PromptArguments, sampling: SamplingArguments) -> None:
    """Talk turn by turn; the chat template carries the history. End of input ends it."""
    chat = args.chat
    conversation = Conversation(model, sampling, chat)
    params = beam_params(sampling) or sampling_params(sampling)
    llm = LLM(
        model,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=conversation.limit + sampling.max_length,
    )
    interactive = sys.stdin.isatty()
    if interactive:
        _note("Type a prompt; /reset forgets the conversation, /exit ends.\n")
    messages: list[dict[str, str]] = []
    while True:
        if interactive:
            _note("> ")
        line = sys.stdin.readline()
        text = line.rstrip("\r\n")
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
            _note(f"error: {error}\n")
            messages.pop()
            continue
        answer = _answer_one(llm, conversation.prompt(ids, args.adapter), params)
        messages.append({"role": "assistant", "content": answer.text})


def _check_named(place: OpenArguments, adapters: Iterable[str | None]) -> None:
    for name in adapters:
        if name is not None and name not in place.adapter_places:
            there = ", ".join(place.adapter_places) or "none"
            raise UserError(
                f"a prompt is for the adapter {name!r}, which --adapters does not name (it names "
                f"{there}); add --adapters {name}=DIR"
            )


def run(place: OpenArguments, asked: PromptArguments, sampling: SamplingArguments) -> None:
    """Open a model and answer prompts, or talk where there are none.

    Raises:
        UserError: prompts or a model that cannot be read, or that do not fit each other.
    """
    prompts = read_prompts(asked)
    if place.chat_template is not None and not asked.chat:
        raise UserError("chat_template is for conversations; add --chat true, or leave it out")
    if place.add_bos_token is not None and asked.chat:
        raise UserError(
            "add_bos_token is for plain texts: a chat template writes its own BOS; drop one of "
            "add_bos_token and chat"
        )
    _check_named(place, [one.adapter for one in prompts] or [asked.adapter])
    model = open_model(place, find_model(place))
    if prompts:
        answer_prompts(model, prompts, asked, sampling)
    else:
        chat_on_stdin(model, asked, sampling)
