"""Measure a model: perplexity, answers, multiple choice, long contexts."""

from common.ending import run_script  # isort: split

import dataclasses
import sys

from common.files import check_target
from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "evaluate_generation.py"
_DESCRIPTION = """\
Perplexity of text, exact match and F1 of answers, accuracy of multiple choice, what is found in
long contexts.

  perplexity   --task perplexity --data_file text.txt --stride 512
  answers      --task squad --data_file dev-v1.1.json; --task cmrc of Chinese ones
  choices      --task choices --data_file val.csv --few_shot_file dev.csv
  several      --task perplexity choices --data_file text.txt val.csv
  C-Eval       --task ceval --data_dir ceval-exam; CMMLU and MMLU likewise
  GSM8K        --task gsm8k --data_file test.jsonl --few_shot_file train.jsonl
  needles      --task needle --context_lengths 1024 4096 --depths 0 50 100

of a model directory (--model_name_or_path, with --lora_path or --prefix_path), or of what
export_generation_model.py wrote (--model_dir). A model too large for one device is shared out over
several (tensor parallelism):

  python -m paddle.distributed.launch --nproc_per_node 2 evaluate_generation.py ..."""


def main() -> None:
    """Read flags and data, open the model, measure, report."""
    place, args = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    from llm.evaluation import report, squad

    args.check_beside(place)
    if args.output_file is not None:
        check_target(args.output_file, "output_file")
    if args.predictions_file is not None:
        if place.rank > 0:
            return  # no model is shared
        from llm.evaluation.tasks import MEASURES

        file, (name,) = args.data_file[0], args.task
        figures = squad.score(
            squad.read_questions(file),
            squad.read_predictions(args.predictions_file),
            MEASURES[name],
        )
        settings = {"predictions_file": args.predictions_file}
        with report.Results(args.output_file, dataclasses.asdict(place)) as results:
            results.add(0, report.Result(name, file, settings, figures))
    else:
        from llm.engine.finding import find_model
        from llm.engine.opening import open_model
        from llm.evaluation.measuring import PARTS, measure
        from llm.evaluation.scorer import checked_length, open_scorer
        from llm.evaluation.tasks import read_tasks

        found = find_model(place)
        checked_length(args.max_length, found.context)
        tasks = read_tasks(args, found)
        opened = dataclasses.asdict(place)
        parts = PARTS.get(args.alone)
        if parts is not None and place.rank == 0:
            parts.check(args.output_file, opened, tasks)
        model = open_model(place, found)
        from llm.evaluation.quantized import rounding_note  # loads paddle: its settings are made

        scorer = open_scorer(model, batch_size=args.batch_size)
        kernels = {one.op: one.form for one in model.ops}
        with (
            report.Results(args.output_file, opened | {"ops": kernels})
            if parts is None
            else parts(args.output_file, opened, tasks, kernels)
        ) as results:
            measure(model, scorer, tasks, results, args.batch_size)
        note = rounding_note(model.network)
        if note:
            sys.stderr.write(note + "\n")


if __name__ == "__main__":
    run_script(main)
