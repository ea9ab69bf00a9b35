"""Answers to many prompts at a time, from Python: ``LLM(...).generate(prompts)``.

What ``predict_generation.py`` and ``infer_generation.py`` run, too.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

from tqdm import tqdm

from common.errors import UserError
from common.flags import build
from llm.config.generation import OpenArguments
from llm.engine.beam import Beam, BeamParams, beam_search
from llm.engine.engine import Engine
from llm.engine.finding import find_model
from llm.engine.opening import OpenedModel, open_model
from llm.engine.request import Completion, Request, SamplingParams, Token, each_of
from llm.engine.texts import AnswerText

Chat = SequenceOf[Mapping[str, str]]
OnToken = Callable[[int, Token], None]


class Prompt(NamedTuple):
    """A prompt as the model sees it.

    Args:
        ids: its tokens.
        before: of these, what the answer's text continues; nothing where it is a turn of its own.
        adapter: see ``llm.engine.request.Request``.
    """

    ids: list[int]
    before: SequenceOf[int] = ()
    adapter: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Args:
        text: without control tokens, up to a stop string.
        completion: its tokens, their log-probabilities and why it ended; with the prompt's scores
            where ``prompt_logprobs`` asks for them.
        prompt_ids: what it answers.
        score: by which beam search and ``best_of`` have chosen it: of these, the mean
            log-probability of its tokens.
    """

    text: str
    completion: Completion
    prompt_ids: list[int]
    score: float | None = None

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer, an end token included."""
        return self.completion.ids

    @property
    def logprobs(self) -> list[float]:
        """Natural logarithm of each token's probability."""
        return self.completion.logprobs

    @property
    def finish_reason(self) -> str | None:
        """``stop`` at an end token or a stop string, ``length`` at the limit."""
        return self.completion.finish_reason


class LLM:
    """A model that answers many prompts at a time.

    Args:
        model: directory of a model, or an opened one.
        max_num_seqs: prompts that are answered together.
        max_num_batched_tokens: tokens of a step; longer prompts are cut.
        max_model_len: prompt plus answer to make room for from the start; as calls need it when not
            given.
        flags: further fields of ``llm.config.generation.OpenArguments``: ``dtype``, ``lora_path``,
            ``model_dir`` of an exported program in place of a model, and the like.

    Raises:
        UserError: a flag that is not there or has another type or range, or no effect beside the
            others; a model that cannot be opened.
    """

    def __init__(
        self,
        model: str | OpenedModel | None = None,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 512,
        max_model_len: int = 1,
        **flags: Any,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value < 1:
                raise UserError(f"{name}={value} has to be at least 1")
        if isinstance(model, OpenedModel):
            if flags:
                raise UserError(f"{sorted(flags)[0]} has no effect on a model that is open already")
            self.model = model
        else:
            named = {} if model is None else {"model_name_or_path": model}
            place = build(OpenArguments, named | flags, "LLM")
            self.model = open_model(place, find_model(place))
        self._max_num_seqs, self._max_step_tokens = max_num_seqs, max_num_batched_tokens
        self._max_model_len = max_model_len
        self._engine: Engine | None = None

    def prompt(self, given: "str | SequenceOf[int] | Chat | Prompt") -> Prompt:
        """Return a text, token ids or a conversation as the model sees it.

        Raises:
            UserError: something else; the model has no chat template, or that refuses the
                conversation.
        """
        if isinstance(given, Prompt):
            return given
        if isinstance(given, str):
            ids = self.model.tokenizer.encode_prompt(given)
            return Prompt(ids, ids)
        items = list(given) if isinstance(given, Iterable) and not isinstance(given, bytes) else []
        chat = [dict(one) for one in items if isinstance(one, Mapping)]
        if chat and len(chat) == len(items):
            return Prompt(self.model.tokenizer.apply_chat_template(chat))
        ids = [int(one) for one in items if isinstance(one, Integral)]  # NumPy's, too
        if not ids or len(ids) < len(items):
            raise UserError(
                f"{given!r:.60} is no prompt: that is a text, a list of token ids, at least one, "
                "or a list of messages; generate takes a list of prompts"
            )
        return Prompt(ids, ids)

    def generate(
        self,
        prompts: "SequenceOf[str | SequenceOf[int] | Chat | Prompt]",
        params: SamplingParams | BeamParams | SequenceOf[SamplingParams] | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        stop: SequenceOf[str] = (),
        progress: bool | None = None,
        on_token: OnToken | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer prompts together.

        Args:
            prompts: texts, lists of token ids, or conversations (lists of messages with role and
                content).
            params: for all, or one per prompt; ``SamplingParams()`` when not given.
            n: answers to each prompt; each draws tokens of its own.
            best_of: draw so many and keep the ``n`` whose tokens have the highest mean
                log-probability, as OpenAI's completions define it.
            stop: texts that end an answer, and are left out.
            progress: a bar on standard error; None shows it on a terminal.
            on_token: called with the number of an answer and each of its tokens as it comes.
            on_answer: called with the number of an answer when it is there; answers end in any
                order.

        Returns:
            Answers in the order of the prompts, ``n`` to each, the best first where there was a
            choice.

        Raises:
            UserError: a prompt that does not fit, before any is answered, or values that do not fit
                each other. After all others are answered, a :class:`BrokenLogitsError` that names
                requests from 1.
        """
        for name, texts in (("prompts", prompts), ("stop", stop)):
            if isinstance(texts, str):
                raise UserError(f"{name}={texts!r:.40} is one text; give a list: [{texts!r:.40}]")
        several = n if best_of is None else best_of
        if not 1 <= n <= several:
            raise UserError(f"n={n} and best_of={best_of}: 1 <= n <= best_of is needed")
        given = [self.prompt(one) for one in prompts]
        if isinstance(params, BeamParams):
            if best_of is not None or stop or on_token is not None:
                raise UserError("beam search knows no best_of, no stop texts and no streaming")
            if any(prompt.adapter is not None for prompt in given):
                raise UserError("beam search answers without adapters; drop num_beams or adapter")
            return self._search(given, params, n, progress, on_answer)
        each = each_of(SamplingParams() if params is None else params, len(given))
        if others := [one for one in each if not isinstance(one, SamplingParams)]:
            raise UserError(
                f"params has {others[0]!r:.40}; it is SamplingParams for all, one for each prompt, "
                "or BeamParams for all"
            )
        requests = [
            Request(
                prompt.ids,
                replace(one, prompt_logprobs=None) if choice else one,
                choice,
                adapter=prompt.adapter,
            )
            for prompt, one in zip(given, each, strict=True)
            for choice in range(several)
        ]
        asked = [prompt for prompt in given for _ in range(several)]
        found = self._answer(requests, asked, stop, progress, on_token, on_answer)
        groups = [found[start : start + several] for start in range(0, len(found), several)]
        for first, *rest in groups:
            for one in rest:  # a prompt is scored once, for all answers to it
                one.completion.prompt = first.completion.prompt
        if best_of is None:
            return found
        return [one for group in groups for one in _best(group, n)]

    def _answer(
        self,
        requests: list[Request],
        asked: list[Prompt],
        stop: SequenceOf[str],
        progress: bool | None,
        on_token: OnToken | None,
        on_answer: Callable[[int, Answer], None] | None,
    ) -> list[Answer]:
        texts = [AnswerText(self.model.decoder(prompt.before), stop) for prompt in asked]
        if not requests:
            return []
        engine = self._room(len(requests), max(request.max_length for request in requests))
        with _bar(len(requests), progress) as bar:

            def push(number: int, token: Token) -> bool:
                ended = texts[number].push(token)
                if on_token is not None:
                    on_token(number, token)
                bar.update(ended)
                return ended

            def done(number: int, completion: Completion) -> None:
                if on_answer is not None:
                    on_answer(number, Answer(texts[number].text, completion, asked[number].ids))

            completions = engine.generate(requests, push, done)
        return [
            Answer(text.text, completion, prompt.ids)
            for text, completion, prompt in zip(texts, completions, asked, strict=True)
        ]

    def _search(
        self,
        given: list[Prompt],
        params: BeamParams,
        n: int,
        progress: bool | None,
        on_answer: Callable[[int, Answer], None] | None,
    ) -> list[Answer]:
        if n > params.num_beams:
            raise UserError(f"n={n} answers of {params.num_beams} beams; raise num_beams")
        if not given:
            return []
        longest = max(len(prompt.ids) for prompt in given) + params.max_new_tokens
        engine = self._room(len(given) * params.num_beams, longest)

        def answer(prompt: Prompt, beam: Beam) -> Answer:
            ids = beam.ids[:-1] if beam.finish_reason == "stop" else beam.ids
            text = self.model.text(ids, prompt.before)
            return Answer(text, beam.completion, prompt.ids, beam.score)

        with _bar(len(given), progress) as bar:

            def done(number: int, beams: list[Beam]) -> None:
                bar.update()
                for place, beam in enumerate(beams[:n] if on_answer is not None else []):
                    assert on_answer is not None
                    on_answer(number * n + place, answer(given[number], beam))

            found = beam_search(engine, [prompt.ids for prompt in given], params, done)
        pairs = zip(given, found, strict=True)
        return [answer(prompt, beam) for prompt, beams in pairs for beam in beams[:n]]

    def _room(self, count: int, max_tokens: int) -> Engine:
        """Return an engine with room for so many requests; the last one's, if it has it."""
        count = min(count, self._max_num_seqs)
        max_tokens = max(max_tokens, self._max_model_len)
        last = self._engine
        if last is None or last.max_sequences < count or last.max_model_len < max_tokens:
            self._engine = self.model.open_engine(
                count, max_tokens, max_step_tokens=self._max_step_tokens
            )
        assert self._engine is not None
        return self._engine


def _bar(total: int, progress: bool | None) -> Any:
    disable = None if progress is None else not progress
    return tqdm(total=total, desc="answers", disable=disable, leave=False)


def _best(answers: SequenceOf[Answer], n: int) -> list[Answer]:
    """Return the answers whose tokens are likeliest in the mean; of equal ones the first."""
    scored = [replace(one, score=sum(one.logprobs) / len(one.logprobs)) for one in answers]
    return sorted(scored, key=lambda one: -(one.score or 0.0))[:n]
