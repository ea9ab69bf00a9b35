"""Measure a model: perplexity, answers, multiple choice."""

import dataclasses

from data.errors import DataError
from llm import runtime
from llm.config.evaluation import EvaluateArguments, EvaluatedModelArguments
from llm.config.loader import load, run_script

_DESCRIPTION = """\
Perplexity of text, exact match and F1 of answers, accuracy of multiple choice.

  perplexity   --task perplexity --data_file text.txt --stride 512
  answers      --task squad --data_file dev-v1.1.json
  choices      --task choices --data_file val.csv --few_shot_file dev.csv
  several      --task perplexity choices --data_file text.txt val.csv

of a model directory (--model_name_or_path, with --lora_path or --prefix_path), or of what
export_generation_model.py wrote (--model_dir)."""


def main() -> None:
    """Read flags and data, open the model, measure, report."""
    model, args = load(
        (EvaluatedModelArguments, EvaluateArguments),
        prog="evaluate_generation.py",
        description=_DESCRIPTION,
    )
    from llm.evaluation import report, squad

    report.check_output(args.output_file)
    if args.predictions_file is not None:
        file = args.data_file[0]
        figures = squad.score(
            squad.read_questions(file), squad.read_predictions(args.predictions_file)
        )
        settings = {"predictions_file": args.predictions_file}
        results = [report.Result("squad", file, settings, figures)]
    else:
        from llm.evaluation.models import open_subject, open_tokenizer
        from llm.evaluation.tasks import read_tasks

        tokenizer = open_tokenizer(model, args.max_length)
        tasks = read_tasks(args, tokenizer)
        threads = runtime.prepare(model.threads, model.device)
        runtime.load_paddle(model.device)
        subject = open_subject(model, tokenizer, threads=threads, batch_size=args.batch_size)
        results = []
        for task in tasks:
            figures = task.run(subject)
            results.append(report.Result(task.name, task.file, task.settings, figures))
    print(report.table(results))
    if args.output_file is not None:
        report.write(args.output_file, dataclasses.asdict(model), results)


if __name__ == "__main__":
    run_script(main, DataError)
