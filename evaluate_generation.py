"""Measure a model: perplexity, answers, multiple choice."""

from common.ending import run_script  # isort: split

import dataclasses
import sys

from common.files import check_target
from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "evaluate_generation.py"
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


def main() -> None:
    """Read flags and data, open the model, measure, report."""
    place, args = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    from llm.evaluation import report, squad

    if args.output_file is not None:
        check_target(args.output_file, "output_file")
    if args.predictions_file is not None:
        if place.rank > 0:
            return  # no model is shared
        file = args.data_file[0]
        figures = squad.score(
            squad.read_questions(file), squad.read_predictions(args.predictions_file)
        )
        settings = {"predictions_file": args.predictions_file}
        with report.Results(args.output_file, dataclasses.asdict(place)) as results:
            results.add(report.Result("squad", file, settings, figures))
    else:
        from llm.engine.opening import find_model, open_model
        from llm.evaluation.quantized import rounding_note
        from llm.evaluation.scorer import checked_length, open_scorer
        from llm.evaluation.tasks import read_tasks

        found = find_model(place)
        checked_length(args.max_length, found.context)
        tasks = read_tasks(args, found.tokenizer)
        model = open_model(place, found)
        scorer = open_scorer(model, batch_size=args.batch_size)
        described = dataclasses.asdict(place) | {"ops": {one.op: one.form for one in model.ops}}
        with report.Results(args.output_file, described) as results:
            for task in tasks:
                figures = task.run(model, scorer)
                results.add(report.Result(task.name, task.file, task.settings, figures))
        note = rounding_note(model.network)
        if note:
            sys.stderr.write(note + "\n")


if __name__ == "__main__":
    run_script(main)
