"""A pretraining run from end to end, checked and its data opened before paddle is imported."""

from pathlib import Path

from common.errors import UserError
from llm.config.network import ModelArguments
from llm.config.training import DataArguments, PretrainArguments
from llm.llama.config import LlamaConfig
from llm.planner import Workload
from llm.train import checkpoints, checks
from llm.train.checkpoints import Checkpoint
from llm.train.checks import Plan
from llm.train.pretrain_data import open_data, passes
from llm.train.resuming import check_resume


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
    length = data.max_seq_length
    run.count_tokens(
        run.samples_per_step * length,
        lambda tokens: start.step_at(tokens / length, run.samples_per_step),
    )
    messages += checks.check_layout(run, config, data.max_seq_length)
    checks.check_fp8(run, config)
    if run.do_train:
        checks.check_training(run, max_steps, config.num_parameters, config.num_parameters)
    plan = Plan(config, _weights(model, run, resume, messages), resume, max_steps)
    plan.start = start
    plan.messages = messages
    _check_lengths(data, config)
    plan.tokenizer = checks.model_tokenizer(model, resume, config, messages)
    open_data(plan, data, run)
    if resume is not None:
        check_resume(plan, resume, (model, data, run))
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
        assert train is not None
        often = passes(train)
        samples = plan.start.sample_at(plan.max_steps, run.samples_per_step)
        parts += [
            f"run: {plan.max_steps:,} updates of {tokens:,} tokens, "
            f"{samples * data.max_seq_length:,} in "
            f"all, {often} pass{'es' if often > 1 else ''} over the training part at most",
        ]
    return "; ".join(parts)
