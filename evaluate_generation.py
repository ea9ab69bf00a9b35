"""Measure a model: perplexity, answers, multiple choice."""

import dataclasses

from common.errors import UserError
from common.files import check_target
from common.flags import load, run_script
from llm import runtime
from llm.config.evaluation import EvaluateArguments, EvaluatedModelArguments
from llm.config.generation import SharingArguments

_DESCRIPTION = """\
Perplexity of text, exact match and F1 of answers, accuracy of multiple choice.

  perplexity   --task perplexity --data_file text.txt --stride 512
  answers      --task squad --data_file dev-v1.1.json
  choices      --task choices --data_file val.csv --few_shot_file dev.csv
  several      --task perplexity choices --data_file text.txt val.csv

of a model directory (--model_name_or_path, with --lora_path or --prefix_path), or of what
export_generation_model.py wrote (--model_dir). A model too large for one device is shared out over
several (tensor parallelism):

  python -m paddle.distributed.launch --nproc_per_node 2 evaluate_generation.py ..."""


def _check_sharing(model: EvaluatedModelArguments, sharing: SharingArguments) -> None:
    """Refuse a model that the launched processes cannot share."""
    from llm.llama.config import load_config
    from llm.parallel.rules import check_shape

    if model.model_name_or_path is not None:
        config = load_config(model.model_name_or_path)
        check_shape(sharing.layout, config, seq_length=1, micro_batches=1)
    elif sharing.layout.tensor > 1:
        raise UserError(
            f"{sharing.layout.tensor} processes were launched, but an exported program runs in "
            "one; give --model_name_or_path, or start one process"
        )


def main() -> None:
    """Read flags and data, open the model, measure, report."""
    model, args, sharing = load(
        (EvaluatedModelArguments, EvaluateArguments, SharingArguments),
        prog="evaluate_generation.py",
        description=_DESCRIPTION,
    )
    from llm.evaluation import report, squad

    if args.output_file is not None:
        check_target(args.output_file, "output_file")
    if args.predictions_file is not None:
        file = args.data_file[0]
        figures = squad.score(
            squad.read_questions(file), squad.read_predictions(args.predictions_file)
        )
        settings = {"predictions_file": args.predictions_file}
        results = [report.Result("squad", file, settings, figures)]
    else:
        from llm.engine.opening import open_tokenizer
        from llm.evaluation.models import open_subject
        from llm.evaluation.tasks import read_tasks

        _check_sharing(model, sharing)
        tokenizer = open_tokenizer(model, args.max_length)
        tasks = read_tasks(args, tokenizer)
        threads = runtime.prepare(runtime.process_threads(model.threads), model.device)
        runtime.load_paddle(model.device)
        from llm.parallel.topology import start

        topology = start(sharing.layout, model.device)
        subject = open_subject(
            model, tokenizer, threads=threads, batch_size=args.batch_size, topology=topology
        )
        results = []
        for task in tasks:
            figures = task.run(subject)
            results.append(report.Result(task.name, task.file, task.settings, figures))
    if sharing.rank:
        return  # all processes have the same figures
    print(report.table(results))
    if args.output_file is not None:
        report.write(args.output_file, dataclasses.asdict(model), results)


if __name__ == "__main__":
    run_script(main)
