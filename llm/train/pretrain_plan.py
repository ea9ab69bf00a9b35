"""A pretraining run from end to end, checked and its data opened before paddle is imported."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from data.corpus.pretrain_dataset import Extended, PretrainDataset, build_pretrain_datasets
from data.corpus.token_store import TokenStore, find_stores
from llm.config.training import DataArguments, ModelArguments, PretrainArguments
from llm.llama.config import LlamaConfig
from llm.planner import Workload
from llm.train import checkpoints, checks
from llm.train.checkpoints import Checkpoint
from llm.train.checks import LAID_OUT, SAMPLES_PER_STEP, Plan


def plan_run(model: ModelArguments, data: DataArguments, run: PretrainArguments) -> Plan:
    """Check a run from end to end and open its data.

    Args:
        model: where model and tokenizer come from.
        data: where the tokens come from.
        run: what to do with them.

    Raises:
        UserError: the first thing that is wrong, with the fix.
        DataError: a token store or tokenizer that cannot be used.
    """
    checks.check_environment(run)
    output_dir = Path(run.output_dir)
    resume, messages = checkpoints.find_resume(output_dir, run.resume_from_checkpoint)
    checks.check_output_dir(output_dir, model, run, resume)
    config = checks.architecture(model, resume)
    start = checks.data_start(run, resume, messages)
    max_steps = run.total_steps(data.max_seq_length)
    if run.train_tokens is not None:
        max_steps = start.step_at(run.train_tokens / data.max_seq_length, run.samples_per_step)
    messages += checks.check_layout(run, config, data.max_seq_length)
    checks.check_fp8(run, config)
    if run.do_train:
        checks.check_training(run, max_steps, config.num_parameters, config.num_parameters)
    plan = Plan(config, _weights(model, run, resume, messages), resume, max_steps)
    plan.start = start
    plan.messages = messages
    _check_lengths(data, config)
    plan.tokenizer = checks.model_tokenizer(model, resume, config, messages)
    _open_data(plan, data, run)
    if resume is not None:
        checks.check_resume(plan, resume, (model, data, run))
    if run.do_train:
        checks.use_prediction(plan, run, Workload.of(plan.config, model, run, data.max_seq_length))
    plan.messages.append(_summary(plan, data, run))
    return plan


def _weights(
    model: ModelArguments,
    run: PretrainArguments,
    resume: Checkpoint | None,
    messages: list[str],
) -> Path | None:
    if resume is not None:
        return resume.path
    path = Path(model.model_name_or_path or "")
    if not model.continue_training:
        if not run.do_train:
            messages.append("measuring random weights: neither continue_training nor a checkpoint")
        return None
    if not path.is_dir():
        if str(path).startswith("__internal_testing__"):
            messages.append(f"continue_training: {path} stands for random weights")
            return None
        raise UserError(
            f"continue_training needs weights, and {path} is only a shape: give a model directory, "
            "or drop --continue_training to start from random weights"
        )
    if not any(path.glob("model*.safetensors")):
        raise UserError(f"continue_training: {path} has no model*.safetensors")
    return path


def _check_lengths(data: DataArguments, config: LlamaConfig) -> None:
    if data.max_seq_length > config.context:
        raise UserError(
            f"max_seq_length={data.max_seq_length} exceeds the model's {config.described_context}; "
            "lower max_seq_length"
        )


def _store(plan: Plan, data: DataArguments) -> TokenStore:
    if data.input_dir is None:
        raise UserError("input_dir is missing: give a token store made by `python -m data.prepare`")
    prefix = Path(data.input_dir)
    if prefix.is_dir():
        stores = find_stores(prefix)
        if len(stores) != 1:
            names = ", ".join(path.name for path in stores) or "none"
            raise UserError(
                f"input_dir={prefix} has to hold exactly one token store (.bin/.idx or "
                f"_ids.npy/_idx.npz), found {names}; name one as {prefix / 'NAME'}"
            )
        prefix = stores[0]
    store = TokenStore.open(prefix)
    fingerprint = None if plan.tokenizer is None else plan.tokenizer.fingerprint
    store.check_vocab(plan.config.vocab_size, fingerprint=fingerprint)
    return store


def _laid_out(plan: Plan, run: PretrainArguments) -> list[int]:
    """Return how many samples are laid out at a time: at the start, and with each extension."""
    if not run.do_train:
        return [0]
    needed = plan.start.sample_at(plan.max_steps, run.samples_per_step)
    if plan.resume is None or run.ignore_data_skip:
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


def _open_data(plan: Plan, data: DataArguments, run: PretrainArguments) -> None:
    store = _store(plan, data)
    counts = _laid_out(plan, run)

    def opened(number: int, *others: int | None) -> tuple[Any, ...]:
        return build_pretrain_datasets(
            store.prefix,
            seq_length=data.max_seq_length,
            split=data.split,
            num_samples=(counts[number], *others),
            seed=(run.seed + number) % 2**32,
            cache_dir=data.data_cache,
        )

    train, dev, test = opened(0, None if run.do_eval else 0, None if run.do_predict else 0)
    if len(counts) > 1:
        more = [opened(number, 0, 0)[0] for number in range(1, len(counts))]
        train = Extended([train, *more], counts)
    plan.datasets = {"train": train, "eval": dev, "test": test}
    plan.data_state = {
        "num_documents": store.num_documents,
        "num_tokens": store.num_tokens,
        "store": store.fingerprint(),
        "split": data.split,
        "max_seq_length": data.max_seq_length,
        "seed": run.seed,
        SAMPLES_PER_STEP: run.samples_per_step,
        LAID_OUT: counts,
    }


def _summary(plan: Plan, data: DataArguments, run: PretrainArguments) -> str:
    parameters = plan.config.num_parameters
    parts = [
        f"model: {parameters / 1e6:.2f} million parameters",
        f"data: {plan.data_state['num_documents']:,} documents, "
        f"{plan.data_state['num_tokens']:,} tokens",
    ]
    if run.do_train:
        tokens = run.samples_per_step * data.max_seq_length
        train = plan.datasets["train"]
        assert isinstance(train, PretrainDataset | Extended)
        passes = train.epochs
        samples = plan.start.sample_at(plan.max_steps, run.samples_per_step)
        parts += [
            f"run: {plan.max_steps:,} updates of {tokens:,} tokens, "
            f"{samples * data.max_seq_length:,} in "
            f"all, {passes} pass{'es' if passes > 1 else ''} over the training part at most",
        ]
    return "; ".join(parts)
