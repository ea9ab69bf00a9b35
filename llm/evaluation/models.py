"""What is measured: a network with or without an adapter, or an exported program."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.tokenizer import Tokenizer
from llm.config.evaluation import EvaluatedModelArguments
from llm.engine.engine import Engine
from llm.evaluation.scorer import NetworkScorer, PagedScorer, Scorer


@dataclass(frozen=True)
class Subject:
    """An opened model."""

    tokenizer: Tokenizer
    scorer: Scorer
    context: int  # prompt plus answer
    open_engine: Callable[[int, int], Engine]  # (max_sequences, max_tokens)
    eos_ids: tuple[int, ...]


def open_subject(
    args: EvaluatedModelArguments,
    tokenizer: Tokenizer,
    *,
    threads: int,
    batch_size: int = 8,
    max_length: int | None = None,
    topology: Any = None,
) -> Subject:
    """Load the model; ``runtime.load_paddle`` has run.

    Args:
        args: which model, on which device.
        tokenizer: from :func:`open_tokenizer`.
        threads: what ``runtime.prepare`` returned.
        batch_size: texts that run together.
        max_length: context of scoring; the model's when not given.
        topology: of tensor parallel processes that share the network (``llm.parallel``); None is a
            job of one. Every process has to measure the same things, and finds the same figures.

    Raises:
        UserError: a damaged model, an adapter of another one, or a device that is not there.
    """
    runner: Any
    if args.model_dir is not None:
        from llm.engine.runners import PredictorRunner

        runner = PredictorRunner(
            args.model_dir,
            args.model_prefix,
            device=args.device,
            threads=threads,
        )
        scorer: Scorer = PagedScorer(runner, max_length=max_length, batch_size=batch_size)
    else:
        from llm.engine.runners import DygraphRunner
        from llm.llama.adapters.opening import load_adapter
        from llm.llama.build import load_model

        options = {"dtype": args.dtype, "ops": args.op_modes, "topology": topology}
        model = load_model(str(args.model_name_or_path), **options)
        if args.path is not None:
            load_adapter(model, args.path)
        runner = DygraphRunner(model)
        scorer = NetworkScorer(model, max_length=max_length, batch_size=batch_size)

    def open_engine(max_sequences: int, max_tokens: int) -> Engine:
        return Engine(runner, max_sequences=max_sequences, max_tokens=max_tokens)

    return Subject(tokenizer, scorer, runner.max_model_len, open_engine, runner.eos_ids)
