"""Beam search: the answers of the highest probability that a search of some width finds.

A loop of its own over the engine, which knows nothing of beams: in each turn every beam is a
request for one token, and the prefix cache has what the beams share. What a turn computes of a beam
is its last block at most.

Scores, candidates and ends are those of ``transformers`` (``GenerationMixin._beam_search``): of the
best continuations, as many times the beams as there are end tokens and one more, those that end go
to the finished answers where they are among the best ``num_beams``, and the best of the others live
on. A finished answer counts with its log-probability divided by its length to the power of
``length_penalty`` (Wu et al. 2016, without their constant).
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from common.errors import UserError
from llm.config.sampling import check_range, check_whole
from llm.engine.engine import Engine
from llm.engine.request import Completion, Request, SamplingParams, Token


@dataclass(frozen=True)
class BeamParams:
    """How wide to search, and when it is enough.

    Args:
        num_beams: answers that are followed at a time.
        max_new_tokens: most tokens of an answer.
        length_penalty: above 0, longer answers rise; 0 compares log-probabilities as they are.
        early_stopping: end as soon as ``num_beams`` answers have ended; else when no running one
            can become better than these.
        ignore_eos: answers end at the limit alone.

    Raises:
        UserError: a value outside its range.
    """

    num_beams: int = 4
    max_new_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 2), ("max_new_tokens", 1)):
            check_whole(name, getattr(self, name), least)
        check_range("length_penalty", self.length_penalty)


@dataclass(frozen=True)
class Beam:
    """An answer, or the beginning of one.

    Args:
        ids: of its tokens, an end token included.
        logprobs: of each, the model's own.
        score: sum of these; of a finished one, divided by its length to the power of the penalty.
        finish_reason: ``stop`` or ``length``; None while it runs.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    finish_reason: str | None = None

    @property
    def completion(self) -> Completion:
        """The answer as the engine gives others."""
        return Completion(list(self.ids), list(self.logprobs), self.finish_reason)


@dataclass
class _Search:
    """One prompt's beams."""

    prompt_ids: SequenceOf[int]
    params: BeamParams
    end_ids: frozenset[int]
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    finished: list[Beam] = field(default_factory=list)  # the best first
    done: bool = False

    @property
    def width(self) -> int:
        """Candidates of a turn: enough to live on where every other one ends."""
        return max(2, 1 + len(self.end_ids)) * self.params.num_beams

    def requests(self) -> list[Request]:
        """Return what each running beam asks."""
        one = SamplingParams(1, temperature=0.0, logprobs=self.width, ignore_eos=True)
        return [Request([*self.prompt_ids, *beam.ids], one) for beam in self.running]

    def take(self, tokens: SequenceOf[Token]) -> None:
        """Take the likeliest tokens behind each running beam."""
        params, length = self.params, len(self.running[0].ids) + 1
        candidates = [
            Beam(
                (*beam.ids, token_id),
                (*beam.logprobs, logprob),
                beam.score + logprob,
                self._reason(token_id, length),
            )
            for beam, token in zip(self.running, tokens, strict=True)
            for token_id, logprob in token.top
        ]
        best = sorted(candidates, key=lambda beam: -beam.score)[: self.width]
        shrink = float(length) ** params.length_penalty
        self.finished += [
            Beam(beam.ids, beam.logprobs, beam.score / shrink, beam.finish_reason)
            for beam in best[: params.num_beams]
            if beam.finish_reason is not None
        ]
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[params.num_beams :]
        self.running = [beam for beam in best if beam.finish_reason is None][: params.num_beams]
        full = len(self.finished) == params.num_beams
        self.done = not self.running or (
            full
            and (params.early_stopping or self.running[0].score / shrink <= self.finished[-1].score)
        )

    def _reason(self, token_id: int, length: int) -> str | None:
        if token_id in self.end_ids:
            return "stop"
        return "length" if length == self.params.max_new_tokens else None


def beam_search(
    engine: Engine,
    prompts: SequenceOf[SequenceOf[int]],
    params: BeamParams,
    on_done: Callable[[int, list[Beam]], None] | None = None,
) -> list[list[Beam]]:
    """Search for answers to several prompts together.

    Args:
        engine: with room for each prompt and its answer.
        prompts: token ids of each.
        params: for all.
        on_done: called with a prompt's number and its answers when they are there.

    Returns:
        Up to ``num_beams`` finished answers to each prompt, the best first.

    Raises:
        UserError: more beams than the vocabulary has tokens for; or a prompt that the engine
            refuses, before any work. Later, a :class:`BrokenLogitsError`.
    """
    end_ids = frozenset(() if params.ignore_eos else engine.eos_ids)
    searches = [_Search(prompt, params, end_ids) for prompt in prompts]
    for search in searches:
        if search.width > engine.vocab_size:
            raise UserError(
                f"num_beams={params.num_beams} looks at {search.width} tokens behind each beam, "
                f"and the model has {engine.vocab_size}; take fewer"
            )
        longest = SamplingParams(params.max_new_tokens, temperature=0.0)
        engine.check(Request(search.prompt_ids, longest))
    open_ = dict(enumerate(searches))
    while open_:
        asked = [(search, request) for search in open_.values() for request in search.requests()]
        found: list[Token] = [Token(0, 0.0)] * len(asked)
        engine.generate([request for _, request in asked], found.__setitem__)
        tokens = iter(found)
        for number, search in list(open_.items()):
            search.take([next(tokens) for _ in search.running])
            if search.done:
                del open_[number]
                if on_done is not None:
                    on_done(number, search.finished)
    return [search.finished for search in searches]
