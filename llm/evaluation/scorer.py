"""Log-likelihoods of token ids under any model: a network in dygraph or an exported program.

R rows of logits, V vocabulary. A request is context and continuation; requests that share their
input (one-token choices after one question) share one pass. Inputs run sorted by length, in
batches whose logits fit a budget, and only statistics of the wanted positions are kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from llm.engine.batch import Batch, Runner
from llm.engine.opening import OpenedModel
from llm.engine.request import BrokenLogitsError
from llm.engine.sampler import Kernel, score_targets

if TYPE_CHECKING:  # data is read and checked before paddle is loaded
    import paddle

    from llm.llama.modeling import LlamaForCausalLM

# What a batch may take: bytes of float32 logits, and tokens with their padding. One row always
# runs, however long.
_LOGIT_BYTES = 256 << 20
_BATCH_TOKENS = 8192
# Tokens of one step of an exported program, as in generation: attention's memory grows with it.
_STEP_TOKENS = 512
_PAD = 0  # never attended to: attention is causal and padding is on the right


@dataclass(frozen=True)
class Score:
    """What a model makes of one continuation."""

    logprob: float  # natural logarithm of its probability, summed over its tokens
    is_greedy: bool  # whether each token is the likeliest one


@dataclass(frozen=True)
class Row:
    """Ids that go in, and the ids that should follow the last ``len(targets)`` of them."""

    ids: np.ndarray
    targets: np.ndarray


@dataclass
class _Input:
    """One distinct input, and the rows that want some of its logits."""

    ids: np.ndarray
    members: list[int]
    first: int  # earliest position whose logits are wanted

    @property
    def wanted(self) -> int:
        """Positions whose logits are wanted."""
        return len(self.ids) - self.first


# Logits [R, V] and, for each of them, the input's number in the batch and the position [R, 2].
_Logits = tuple["paddle.Tensor", np.ndarray]


class Scorer(ABC):
    """Scores continuations with one model.

    Args:
        vocab_size: ids of the model.
        max_length: most tokens that go in at once.
        batch_size: most inputs per pass.
    """

    def __init__(self, vocab_size: int, max_length: int, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} has to be at least 1")
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.batch_size = batch_size
        self.batch_logits = max(1, _LOGIT_BYTES // (4 * vocab_size))
        self._kernel: Kernel | None = None  # of logits on the host
        self.truncated = 0  # requests so far whose context was cut on the left

    @abstractmethod
    def _forward(self, batch: Sequence[_Input]) -> Iterator[_Logits]:
        """Yield the wanted logits of a batch, in any order."""

    @abstractmethod
    def _prepare(self, batches: Sequence[Sequence[_Input]]) -> None:
        """Get ready for these batches."""

    def score_rows(self, rows: Sequence[Row], description: str = "scoring") -> list[Score]:
        """Return one score per row, in order.

        Args:
            rows: at most ``max_length`` ids each, and no more targets than ids.
            description: of the progress bar.

        Raises:
            UserError: an id outside the vocabulary, or logits that hold nan or inf.
        """
        for row in rows:
            assert 0 < len(row.targets) <= len(row.ids) <= self.max_length
        self._check_ids(rows)
        inputs = _distinct(rows)
        batches = list(self._batches(inputs))
        self._prepare(batches)
        logprobs = np.zeros(len(rows))
        greedy = np.ones(len(rows), dtype=bool)
        with tqdm(total=len(rows), desc=description, disable=None, leave=False) as bar:
            for batch in batches:
                self._add_scores(batch, rows, logprobs, greedy)
                bar.update(sum(len(item.members) for item in batch))
        return [Score(float(p), bool(g)) for p, g in zip(logprobs, greedy, strict=True)]

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score continuations after their contexts.

        A context that does not fit is cut on the left, as lm-evaluation-harness does
        (``HFLM._loglikelihood_tokens``), and counted in ``truncated``.

        Args:
            requests: pairs of context ids and continuation ids.

        Raises:
            UserError: an empty context, a continuation that alone exceeds the model's context, or
                an id outside the vocabulary.
        """
        rows, filled = [], []
        for number, (context, continuation) in enumerate(requests):
            if not len(continuation):
                continue
            if not len(context):
                raise UserError(
                    f"request {number} has an empty context; give at least a BOS token to "
                    "predict the first token from"
                )
            if len(continuation) > self.max_length:
                raise UserError(
                    f"the continuation of request {number} has {len(continuation)} tokens, the "
                    f"model's context only {self.max_length}; shorten it"
                )
            ids = np.asarray([*context, *continuation], dtype=np.int64)[-(self.max_length + 1) :]
            self.truncated += len(ids) < len(context) + len(continuation)
            rows.append(Row(ids[:-1], np.asarray(continuation, dtype=np.int64)))
            filled.append(number)
        scores = [Score(0.0, True)] * len(requests)
        for number, score in zip(filled, self.score_rows(rows, "likelihoods"), strict=True):
            scores[number] = score
        return scores

    def rolling(self, documents: Sequence[Sequence[int]], prefix_id: int) -> list[float]:
        """Return the log-likelihood of whole documents, each token scored once.

        Windows follow lm-evaluation-harness (``get_rolling_token_windows`` with a context of one):
        disjoint, the first starting from ``prefix_id``, the last one filled up on the left.

        Raises:
            UserError: an id outside the vocabulary.
        """
        rows, owners = [], []
        for number, ids in enumerate(documents):
            made = rolling_rows(ids, prefix_id, self.max_length)
            rows += made
            owners += [number] * len(made)
        totals = np.zeros(len(documents))
        scores = self.score_rows(rows, "rolling likelihoods")
        np.add.at(totals, np.asarray(owners, dtype=int), [score.logprob for score in scores])
        return totals.tolist()

    def _pick(
        self, logits_RV: "paddle.Tensor", row_K: np.ndarray, target_K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log-probabilities of targets and whether each has the largest logit of its row."""
        if not logits_RV.place.is_cpu_place():
            return _pick_on_device(logits_RV, row_K, target_K)
        if self._kernel is None:
            from external_ops.backend import select_ops

            self._kernel = select_ops(device="cpu").sample
        return score_targets(logits_RV, row_K, target_K, self._kernel)

    def _check_ids(self, rows: Sequence[Row]) -> None:
        for row in rows:
            low = min(int(row.ids.min()), int(row.targets.min()))
            high = max(int(row.ids.max()), int(row.targets.max()))
            if low < 0 or high >= self.vocab_size:
                raise UserError(
                    f"token id {low if low < 0 else high} is outside the model's vocabulary of "
                    f"{self.vocab_size}; does the tokenizer or token store belong to this model?"
                )

    def _batches(self, inputs: list[_Input]) -> Iterator[list[_Input]]:
        batch: list[_Input] = []
        wanted = 0
        for item in sorted(inputs, key=lambda item: -len(item.ids)):
            # The first input is the longest, so it says how far the others are padded.
            full = batch and (
                len(batch) == self.batch_size
                or (len(batch) + 1) * len(batch[0].ids) > _BATCH_TOKENS
                or wanted + item.wanted > self.batch_logits
            )
            if full:
                yield batch
                batch, wanted = [], 0
            batch.append(item)
            wanted += item.wanted
        if batch:
            yield batch

    def _add_scores(
        self, batch: list[_Input], rows: Sequence[Row], logprobs: np.ndarray, greedy: np.ndarray
    ) -> None:
        wanted = [
            (number, len(item.ids) - len(rows[member].targets) + step, target, member)
            for number, item in enumerate(batch)
            for member in item.members
            for step, target in enumerate(rows[member].targets)
        ]
        number_K, position_K, target_K, member_K = np.asarray(wanted, dtype=np.int64).T
        place = np.empty([len(batch), len(batch[0].ids)], dtype=np.int64)
        missing = len(wanted)
        for logits_RV, where_R2 in self._forward(batch):
            place.fill(-1)
            place[where_R2[:, 0], where_R2[:, 1]] = np.arange(len(where_R2))
            row_K = place[number_K, position_K]
            here = row_K >= 0
            got, is_best = self._pick(logits_RV, row_K[here], target_K[here])
            if not np.isfinite(got).all():
                first = int(member_K[here][~np.isfinite(got)][0])
                raise BrokenLogitsError(f"text {first + 1} of {len(rows)}")
            np.add.at(logprobs, member_K[here], got)
            np.logical_and.at(greedy, member_K[here], is_best)
            missing -= int(here.sum())
        assert missing == 0, f"{missing} positions have no logits"


def rolling_rows(ids: Sequence[int], prefix_id: int, max_length: int) -> list[Row]:
    """Cut one document into the rows of :meth:`Scorer.rolling`; none for an empty document."""
    tokens = np.asarray([prefix_id, *ids], dtype=np.int64)
    rows = []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        rows.append(Row(tokens[max(0, end - max_length) : end], tokens[start + 1 : end + 1]))
    return rows


def _distinct(rows: Sequence[Row]) -> list[_Input]:
    found: dict[bytes, _Input] = {}
    for number, row in enumerate(rows):
        first = len(row.ids) - len(row.targets)
        item = found.setdefault(row.ids.tobytes(), _Input(row.ids, [], first))
        item.members.append(number)
        item.first = min(item.first, first)
    return list(found.values())


def _pick_on_device(
    logits_RV: "paddle.Tensor", row_K: np.ndarray, target_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute ``llm.engine.sampler.score_targets`` where the logits lie."""
    import paddle

    normaliser = paddle.logsumexp(logits_RV, axis=-1).numpy()
    best = paddle.argmax(logits_RV, axis=-1).numpy()
    index = paddle.to_tensor(np.stack([row_K, target_K], axis=1))
    chosen = paddle.gather_nd(logits_RV, index).numpy().astype(np.float64)
    return chosen - normaliser[row_K], best[row_K] == target_K


class NetworkScorer(Scorer):
    """Scores with the network: whole rows, padded on the right.

    Args:
        model: the network, adapters included; switched to evaluation.
        max_length: most tokens at once; what a prefix leaves of the trained context when not given.
        batch_size: most inputs per pass.

    Raises:
        UserError: ``max_length`` beyond that.
    """

    def __init__(
        self, model: "LlamaForCausalLM", *, max_length: int | None = None, batch_size: int = 8
    ) -> None:
        config, prefix = model.config, model.seams.prefix
        taken = 0 if prefix is None else prefix.length
        dynamic = config.rope_scaling.rope_type == "dynamic"
        usual = (config.max_position_embeddings if dynamic else config.context) - taken
        length = checked_length(max_length, config.context - taken, usual)
        super().__init__(config.vocab_size, length, batch_size)
        self.model = model

    def _prepare(self, batches: Sequence[Sequence[_Input]]) -> None:
        self.model.eval()  # whoever trains the network switches it back

    def _forward(self, batch: Sequence[_Input]) -> Iterator[_Logits]:
        import paddle

        length = len(batch[0].ids)
        ids_BS = np.full([len(batch), length], _PAD, dtype=np.int64)
        for number, item in enumerate(batch):
            ids_BS[number, : len(item.ids)] = item.ids
        where = np.concatenate(
            [_positions(number, item.first, item) for number, item in enumerate(batch)]
        )
        rows_n = paddle.to_tensor(where[:, 0] * length + where[:, 1])
        with paddle.no_grad():
            yield self.model(paddle.to_tensor(ids_BS), rows_n=rows_n), where


class PagedScorer(Scorer):
    """Scores through the packed step over a paged cache: an exported program, mostly.

    Args:
        runner: executes steps; its cache is allocated anew by each call.
        max_length: most tokens at once; the runner's context when not given.
        batch_size: most inputs per step.

    Raises:
        UserError: ``max_length`` beyond the runner's context.
    """

    def __init__(
        self, runner: Runner, *, max_length: int | None = None, batch_size: int = 8
    ) -> None:
        length = checked_length(max_length, runner.max_model_len)
        super().__init__(runner.vocab_size, length, batch_size)
        self.runner = runner

    def _blocks(self, item: _Input) -> int:
        return -(-len(item.ids) // self.runner.block_size)

    def _prepare(self, batches: Sequence[Sequence[_Input]]) -> None:
        self.runner.allocate(max((sum(map(self._blocks, batch)) for batch in batches), default=1))

    def _forward(self, batch: Sequence[_Input]) -> Iterator[_Logits]:
        import paddle

        width = self._blocks(batch[0])
        table_NM = np.zeros([len(batch), width], dtype=np.int32)
        used = 0
        for number, item in enumerate(batch):
            count = self._blocks(item)
            table_NM[number, :count] = np.arange(used, used + count)
            used += count
        chunk = max(1, _STEP_TOKENS // len(batch))
        for start in range(0, len(batch[0].ids), chunk):
            alive = [item for item in batch if len(item.ids) > start]  # sorted: the first ones
            step = [_positions(n, start, item)[:chunk] for n, item in enumerate(alive)]
            where = np.concatenate(step)
            wanted = where[:, 1] >= np.asarray([item.first for item in alive])[where[:, 0]]
            if not wanted.any():
                wanted[-1] = True  # the program has to return something
            columns = -(-min(start + chunk, len(batch[0].ids)) // self.runner.block_size)
            logits = self.runner.run(
                Batch(
                    np.concatenate([item.ids[start : start + chunk] for item in alive]),
                    where[:, 0].astype(np.int32),
                    where[:, 1].astype(np.int32),
                    np.ascontiguousarray(table_NM[: len(alive), :columns]),
                    np.flatnonzero(wanted),
                )
            )
            yield paddle.to_tensor(logits), where[wanted]


def _positions(number: int, start: int, item: _Input) -> np.ndarray:
    """Return ``[R, 2]``: an input's number beside its positions from ``start`` on."""
    positions = np.arange(start, len(item.ids), dtype=np.int64)
    return np.stack([np.full_like(positions, number), positions], axis=1)


def open_scorer(
    model: OpenedModel, *, max_length: int | None = None, batch_size: int = 8
) -> Scorer:
    """Return a scorer of an opened model.

    A network packed for CPUs and a program are scored by the steps that generate with them, so that
    figures are of what answers; other networks (adapters, references, on GPUs all) by whole rows,
    unless their cache is in another type than they are.

    Args:
        model: what is scored with; where processes share it, by steps, which the others follow.
        max_length: context of scoring; the model's when not given.
        batch_size: texts that run together.

    Raises:
        UserError: ``max_length`` beyond the model's context.
    """
    if max_length is not None:
        model.extend(max_length)
    alone = model.topology.layout.world_size == 1
    if model.network is not None and alone:
        fused = model.network.seams.fused
        own = model.runner.cache_dtype == model.network.model.embed_tokens.type_name
        if own and (fused is None or fused.rows_too):
            return NetworkScorer(model.network, max_length=max_length, batch_size=batch_size)
    return PagedScorer(model.runner, max_length=max_length, batch_size=batch_size)


def checked_length(max_length: int | None, longest: int, usual: int | None = None) -> int:
    """Return the context to use.

    Raises:
        UserError: less than one token, or more than the model was made for.
    """
    if max_length is None:
        return longest if usual is None else usual
    if not 1 <= max_length <= longest:
        raise UserError(
            f"max_length={max_length} has to be between 1 and the model's context of {longest}"
        )
    return max_length
