"""Finetune a Llama: python finetune_generation.py [CONFIG.yaml] [--flag value ...]."""

from common.ending import run_script  # isort: split

from pathlib import Path
from typing import Any

from common.flags import load
from llm import runtime
from llm.config.scripts import SCRIPTS
from llm.train import checkpoints, checks, finetune_plan, logs

_PROG = "finetune_generation.py"
_DESCRIPTION = """\
Finetune on prompts and answers, or on preferences.

  all weights     --model_name_or_path DIR --dataset_path DIR --do_train
  LoRA            the same with --lora true --lora_rank 8
  prefix tuning   the same with --prefix_tuning true --num_prefix_tokens 64
  preferences     any of them with --dpo true, on {prompt, chosen, rejected}"""


def _network(plan: finetune_plan.FinetunePlan, groups: tuple[Any, ...], topology: Any) -> Any:
    network, _, adaptation, qat, run = groups
    from llm.train import finetune

    model = finetune.build_network(plan, network, qat, run, topology)
    adapter = {"base_name": str(network.model_name_or_path), "seed": run.seed}
    if plan.adapter is not None:
        finetune.add_adapter(model, adaptation, start=plan.adapter, **adapter)
    if adaptation.dpo:  # before a new adapter: the reference is the model as it was given
        plan.use_references(finetune.referenced(model, plan, run, topology))
    if plan.adapter is None:
        finetune.add_adapter(model, adaptation, start=None, **adapter)
    finetune.add_noise(model, adaptation.noise_alpha, topology)
    logs.logger.info("%s", finetune.describe(model, topology))
    return model


def _task(plan: Any, groups: tuple[Any, ...], model: Any, topology: Any) -> Any:
    _, data, adaptation, _, run = groups
    from llm.train import finetune, processes
    from llm.train.task import Task

    def save_beside(directory: Path) -> None:
        finetune.save_beside(plan, directory)
        checks.save_settings(groups, directory)

    save, load_back = finetune.storage(adaptation.mode)
    asked = plan.datasets["eval"] if run.eval_with_do_generation else None
    return Task(
        model=model,
        objective=finetune.objective(adaptation),
        save_model=save,
        load_model=load_back,
        save_beside=save_beside,
        count=plan.count,
        flops_per_token=finetune.flops_per_token(model, plan.seq_length),
        collate=plan.collate,
        unit="pairs" if adaptation.dpo else "tokens",
        epoch_ends=plan.epoch_ends,
        generated=finetune.answers(model, asked, plan.tokenizer, data, run),
        **plan.samples,
        **processes.arrange(model, topology, run, plan.prediction),
    )


def main() -> None:
    """Parse, check, train, evaluate, save."""
    groups = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    run = groups[-1]
    runtime.prepare(runtime.process_threads(run.threads), run.device, deterministic=True)
    logs.configure()
    plan = finetune_plan.plan_finetune(groups)
    logs.say(plan.messages)
    groups = (*groups[:-1], plan.run)
    # Slow imports (paddle 2 s, paddlenlp 5 s) come after everything that can be refused.
    runtime.load_paddle(run.device, autocast=plan.run.precision)
    from llm.llama.saving import save_merged
    from llm.train import processes
    from paddlenlp_ext.trainer import LanguageModelTrainer

    topology = processes.join(run)
    model = _network(plan, groups, topology)
    task = _task(plan, groups, model, topology)
    checks.claim_output_dir(run, plan, topology)  # nothing can be refused from here on
    trainer = LanguageModelTrainer(plan.run, task, plan.max_steps)
    if run.do_train:
        trainer.train(None if plan.resume is None else str(plan.resume.path))
        trainer.load_best()
        trainer.save_final()
    trainer.measure()
    if run.do_train and groups[2].merge_weights and topology.rank == 0:
        place = Path(run.output_dir) / checkpoints.MERGED
        save_merged(model, place, plan.tokenizer, say=logs.logger.info)
        logs.say([f"merged model: {place}"])


if __name__ == "__main__":
    run_script(main)
