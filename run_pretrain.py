"""Pretrain a Llama on a token store: python run_pretrain.py [CONFIG.yaml] [--flag value ...]."""

from common.ending import run_script  # isort: split

from pathlib import Path
from typing import Any

from common.flags import load
from llm import runtime
from llm.config.network import ModelArguments
from llm.config.scripts import SCRIPTS
from llm.config.training import PretrainArguments
from llm.train import checks, logs, pretrain_plan

_PROG = "run_pretrain.py"
_DESCRIPTION = "Pretrain a Llama on a token store (made by `python -m data.prepare`)."


def _network(
    plan: checks.Plan, model: ModelArguments, run: PretrainArguments, topology: Any
) -> Any:
    from llm.llama.build import build_model, load_model
    from llm.llama.quantization.network import check_trainable
    from llm.train import processes

    options = {**processes.network_options(model, run), "topology": topology}
    if plan.weights is not None:
        network = load_model(plan.weights, **options)
        if run.do_train:
            check_trainable(network)
        return network
    return build_model(plan.config, seed=run.seed, **options)


def _train_and_measure(plan: checks.Plan, groups: tuple[Any, ...]) -> None:
    model, data, run = groups
    # Slow imports (paddle 2 s, paddlenlp 5 s) come after everything that can be refused.
    runtime.load_paddle(run.device, autocast=run.precision)
    from llm.llama.build import save_model
    from llm.train import processes
    from llm.train.checks import Counts
    from llm.train.objectives import next_token_objective
    from llm.train.task import Task
    from paddlenlp_ext.trainer import LanguageModelTrainer

    def save_beside(directory: Path) -> None:
        if plan.tokenizer is not None:
            plan.tokenizer.save(directory)
        checks.save_settings(groups, directory)

    topology = processes.join(run)
    network = _network(plan, model, run, topology)
    task = Task(
        model=network,
        objective=next_token_objective,
        save_model=save_model,
        save_beside=save_beside,
        count=lambda start, stop: Counts(*[(stop - start) * data.max_seq_length] * 2),
        flops_per_token=plan.config.flops_per_token(data.max_seq_length),
        **plan.samples,
        **processes.arrange(network, topology, run, plan.prediction),
    )
    checks.claim_output_dir(run, plan, topology)  # nothing can be refused from here on
    trainer = LanguageModelTrainer(run, task, plan.max_steps)
    if run.do_train:
        trainer.train(None if plan.resume is None else str(plan.resume.path))
        trainer.save_final()
    trainer.measure()


def main() -> None:
    """Parse, check, train, evaluate."""
    groups = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    run = groups[-1]
    runtime.prepare(runtime.process_threads(run.threads), run.device, deterministic=True)
    logs.configure()
    plan = pretrain_plan.plan_run(*groups)
    logs.say(plan.messages)
    _train_and_measure(plan, groups)


if __name__ == "__main__":
    run_script(main)
