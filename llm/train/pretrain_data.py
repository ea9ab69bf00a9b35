"""The data of a pretraining run: stores opened and laid out, and what checkpoints know of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from common.errors import UserError
from data.corpus.blend import Blend, Extended, Later, Mixture
from data.corpus.pretrain_dataset import PretrainDataset, build_pretrain_datasets
from data.corpus.sources import Sources, open_sources
from data.corpus.token_store import check_alike, shared_store
from llm.config.training import DataArguments, PretrainArguments
from llm.train import checkpoints
from llm.train.checkpoints import Samples
from llm.train.checks import BEGINS, LAID_OUT, SAMPLES_PER_STEP, Plan
from llm.train.logs import logger
from llm.train.resuming import OF_STORES

_MANY = 4_000_000  # samples, whose order takes some seconds to lay out
_ALL_OF = ("1", "0,1", "0,0,1")  # splits that give a part everything
_PATHS = ("input_dir", "valid_data_path", "test_data_path")


@dataclass(frozen=True)
class Begins:
    """Where in its samples a run began to take them from the stores that it reads now.

    Args:
        sample: how many it took from others before.
        layouts: how often those were laid out; each time has an order of its own.
    """

    sample: int = 0
    layouts: int = 0


@dataclass(frozen=True)
class Opened:
    """The stores of each part, and how they are split.

    Args:
        sources: of training, validation and test; None where a part has none.
        splits: what of them each part takes.
    """

    sources: tuple[Sources | None, ...]
    splits: tuple[str, ...]

    @property
    def train(self) -> Sources:
        """The stores of ``input_dir``."""
        assert self.sources[0] is not None
        return self.sources[0]


def open_data(plan: Plan, data: DataArguments, run: PretrainArguments) -> None:
    """Open the stores of a run and lay its samples out; what they are goes into the plan.

    Raises:
        UserError: no stores, or stores that the model or the checkpoint do not fit.
        DataError: a store that cannot be used.
    """
    opened = _open(plan, data, run)
    sources = opened.train
    plan.data_state = {
        "num_documents": sources.num_documents,
        "num_tokens": sources.num_tokens,
        "store": sources.fingerprint(),
        **({"weights": list(sources.weights)} if len(sources.stores) > 1 else {}),
        "split": opened.splits[0],
        "max_seq_length": data.max_seq_length,
        "seed": run.seed,
        SAMPLES_PER_STEP: run.samples_per_step,
    }
    begins = _begins(plan, run, sources)
    counts = _laid_out(plan, run, begins)
    plan.data_state[LAID_OUT] = counts
    if begins.sample:
        plan.data_state[BEGINS] = asdict(begins)
    build = _Builder(data, run.seed, begins.layouts)
    train = build.train(sources, opened.splits[0], counts) if run.do_train else None
    if train is not None and len(sources.stores) > 1:
        plan.messages.append(_about(sources, train, data.max_seq_length))
    if train is not None and begins.sample:
        train = Later(train, begins.sample)
    plan.datasets = {
        "train": train,
        "eval": build.whole(1, opened) if run.do_eval else None,
        "test": build.whole(2, opened) if run.do_predict else None,
    }


def _open(plan: Plan, data: DataArguments, run: PretrainArguments) -> Opened:
    if not data.input_dir:
        raise UserError("input_dir is missing: give a token store made by `python -m data.prepare`")
    words = [getattr(data, flag) for flag in _PATHS]
    sources = [
        open_sources(each, flag) if each else None for each, flag in zip(words, _PATHS, strict=True)
    ]
    fingerprint = None if plan.tokenizer is None else plan.tokenizer.fingerprint
    stores = [store for one in sources if one is not None for store in one.stores]
    for store in stores:
        store.check_vocab(plan.config.vocab_size, fingerprint=fingerprint)
    if plan.tokenizer is None:
        check_alike(stores)
    for one, flag in zip(sources[1:], _PATHS[1:], strict=True):
        both = shared_store([*sources[0].stores, *one.stores]) if sources[0] and one else None
        if both is not None:
            plan.messages.append(
                f"{flag}: {both[1].prefix} is trained on, too ({both[0].prefix}), so that its "
                "figures say nothing of new text"
            )
    if not any(words[1:]):
        return Opened((sources[0],) * 3, (data.split,) * 3)
    for asked, flag, part, given in (
        (run.do_eval, "valid_data_path", "do_eval", "test_data_path"),
        (run.do_predict, "test_data_path", "do_predict", "valid_data_path"),
    ):
        if asked and not getattr(data, flag):
            raise UserError(
                f"{part} needs --{flag} beside {given}: with stores of their own, input_dir is not "
                f"split and all of it is trained on; give it, or drop --{part}"
            )
    return Opened(tuple(sources), _ALL_OF)


def _begins(plan: Plan, run: PretrainArguments, sources: Sources) -> Begins:
    """Where the present stores begin; a run that has ended may be made longer on others."""
    if plan.resume is None or not run.do_train or run.ignore_data_skip:
        return Begins()
    stored = checkpoints.read_json(plan.resume.path / checkpoints.LOADER_STATE)
    begins = Begins(**stored.get(BEGINS, {}))
    names = OF_STORES & {*plan.data_state, *stored}
    consumed, counts = int(stored["consumed_samples"]), stored.get(LAID_OUT, [])
    same = all(stored.get(name) == plan.data_state.get(name) for name in names)
    ended = bool(counts) and consumed >= begins.sample + sum(counts)
    if same or not ended or plan.max_steps <= plan.resume.step:
        return begins
    plan.new_data = True
    plan.messages.append(
        f"the run had ended and goes on with other data: from sample {consumed:,} on it takes "
        f"{sources.describe()}, from the beginning of an order of their own, also of stores that "
        "it had before"
    )
    return Begins(consumed, begins.layouts + len(counts))


def _laid_out(plan: Plan, run: PretrainArguments, begins: Begins) -> list[int]:
    """Return how many samples are laid out at a time: at the start, and with each extension."""
    if not run.do_train:
        return [0]
    needed = plan.start.sample_at(plan.max_steps, run.samples_per_step) - begins.sample
    if plan.resume is None or run.ignore_data_skip or plan.new_data:
        return [needed]
    stored = checkpoints.read_json(plan.resume.path / checkpoints.LOADER_STATE)
    counts: list[int] = stored.get(LAID_OUT, [needed])
    beyond = needed - sum(counts)
    if beyond <= 0:
        return counts
    plan.messages.append(
        f"the run takes {beyond:,} samples more than before: they come after those, in an order of "
        "their own"
    )
    return [*counts, beyond]


@dataclass(frozen=True)
class _Builder:
    """Makes datasets of opened stores.

    Args:
        data: the flags.
        seed: of the first layout of the run.
        layouts: how many there were before.
    """

    data: DataArguments
    seed: int
    layouts: int

    def train(self, sources: Sources, split: str, counts: Sequence[int]) -> Samples:
        """Return samples in the order in which the run takes them.

        Args:
            sources: the stores.
            split: what of them is trained on.
            counts: samples of each layout.
        """
        length = min(sum(counts), sum(sources.weights))
        if length > _MANY:
            logger.info("laying out %s samples of a blend", f"{length:,}")
        mixture = Mixture(sources.weights, sum(counts))
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        taken = [mixture.counts(end) for end in ends]
        parts: list[Samples | None] = []
        for source, store in enumerate(sources.stores):
            needed = [after[source] - before[source] for before, after in pairwise(taken)]
            layouts = [(number, count) for number, count in enumerate(needed) if count]
            built = [
                self._build(store.prefix, split, 0, count, self.layouts + number)
                for number, count in layouts
            ]
            extended = len(counts) > 1 and bool(built)
            whole = Extended(built, [count for _, count in layouts]) if extended else None
            parts.append(whole or next(iter(built), None))
        if len(parts) > 1:
            return Blend(parts, mixture)
        assert parts[0] is not None
        return parts[0]

    def whole(self, part: int, opened: Opened) -> Samples:
        """Return what a part is measured on: of a blend as much as repeats no sample."""
        sources = opened.sources[part]
        assert sources is not None
        split = opened.splits[part]
        built = [self._build(store.prefix, split, part, None, 0) for store in sources.stores]
        if len(built) == 1:
            return built[0]
        total = sum(sources.weights)
        lengths = zip(built, sources.weights, strict=True)
        return Blend(
            built,
            Mixture(sources.weights, min(len(one) * total // weight for one, weight in lengths)),
        )

    def _build(
        self, prefix: Path, split: str, part: int, count: int | None, layout: int
    ) -> PretrainDataset:
        wanted: list[int | None] = [0, 0, 0]
        wanted[part] = count
        built = build_pretrain_datasets(
            prefix,
            seq_length=self.data.max_seq_length,
            split=split,
            num_samples=wanted,
            seed=(self.seed + layout) % 2**32,
            cache_dir=self.data.data_cache,
        )[part]
        assert built is not None
        return built


def passes(train: Samples) -> int:
    """Return how often a run goes over the store that it sees most often, at most."""
    if isinstance(train, Later):
        return passes(train.dataset)
    if isinstance(train, Blend):
        return max(passes(part) for part in train.parts if part is not None)
    if isinstance(train, Extended):
        return sum(map(passes, train.parts))
    assert isinstance(train, PretrainDataset)
    return train.epochs


def _about(sources: Sources, train: Samples, seq_length: int) -> str:
    """Say what a run takes from which store."""
    assert isinstance(train, Blend)
    counts = train.mixture.counts(len(train))
    rows = [
        f"{share:.2%} {store.prefix} ({count:,} samples, {count * seq_length:,} tokens of "
        f"{store.num_tokens:,})"
        for share, store, count in zip(sources.shares, sources.stores, counts, strict=True)
    ]
    why = ""
    if sources.by_size:
        alike = " ".join(f"1 {store.prefix}" for store in sources.stores[:2])
        why = (
            "; stores without weights count by their tokens. For each store alike, as PaddleNLP "
            f"takes those of a directory, give all of them one weight: {alike}"
        )
    return f"blend of {len(rows)} stores: {', '.join(rows[:8])}{why}"
