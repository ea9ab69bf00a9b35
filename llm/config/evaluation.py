"""Arguments of evaluation: what is measured, on which files."""

from dataclasses import dataclass, fields
from typing import ClassVar

from common.errors import UserError
from common.flags import arg
from llm.config.generation import OpenArguments

TASKS = ("perplexity", "squad", "choices")


@dataclass
class EvaluateArguments:
    """What to measure, on which files."""

    # The others only score texts, and neither talk nor keep a cache.
    ONLY_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        "cache_blocks": ("task=squad",),
        "prompt_lookup_num_tokens": ("task=squad",),
        "draft_model_name_or_path": ("task=squad",),
        "chat_template": ("task=squad",),
    }
    # Answers that are there already need no model.
    NOT_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys((field.name for field in fields(OpenArguments)), ("predictions_file",)),
        # A score is of one adapter for all: --lora_path or --prefix_path.
        "adapters": ("task",),
    }

    task: list[str] | None = arg(None, "perplexity, squad, choices: one, or one per file")
    data_file: list[str] | None = arg(
        None,
        "one or more files per task: perplexity takes a token store, .txt or .jsonl; squad SQuAD "
        "or instruction data; choices .jsonl or .csv",
    )
    output_file: str | None = arg(None, "write figures and settings here as JSON")
    predictions_file: str | None = arg(
        None,
        "squad: score these answers (JSON, id to text) instead of asking a model",
        only_with="task=squad",
    )
    limit: int | None = arg(
        None, "use only the first questions or documents", minimum=1, not_with="predictions_file"
    )
    batch_size: int = arg(8, "texts that run together", minimum=1, not_with="predictions_file")
    max_length: int | None = arg(
        None,
        "perplexity: tokens that go in per window; the model's context",
        minimum=1,
        only_with="task=perplexity",
    )
    stride: int | None = arg(
        None,
        "perplexity: tokens between windows; max_length (disjoint) when not given",
        minimum=1,
        only_with="task=perplexity",
    )
    text_format: str = arg(
        "auto",
        "perplexity: txt is one text, jsonl one per line, wikitext one per article",
        choices=("auto", "txt", "jsonl", "wikitext"),
        only_with="task=perplexity",
    )
    wikitext_detokenize: bool = arg(
        False,
        "perplexity: turn WikiText's spaced marks into running text first",
        only_with="task=perplexity",
    )
    few_shot_file: str | None = arg(
        None, "choices: solved examples to show before each question", only_with="task=choices"
    )
    num_few_shot: int = arg(
        5,
        "choices: how many of few_shot_file to show",
        minimum=0,
        only_with=("task=choices", "few_shot_file"),
    )
    description: str = arg("", "choices: text before the examples", only_with="task=choices")
    answer_prompt: str | None = arg(
        None,
        "choices: last line of a csv question; by the file's language when not given",
        only_with="task=choices",
    )
    max_answer_tokens: int = arg(
        32,
        "squad: most tokens of an answer",
        minimum=1,
        only_with="task=squad",
        not_with="predictions_file",
    )
    stop: list[str] | None = arg(
        None, "squad: texts that end an answer", only_with="task=squad", not_with="predictions_file"
    )

    def validate(self) -> None:
        """Refuse tasks and files that do not pair up, and flags without their task.

        Raises:
            UserError: the message names the flag and the fix.
        """
        if not self.task or not self.data_file:
            raise UserError(
                "--task and --data_file are needed, as in --task perplexity --data_file text.txt"
            )
        for task in self.task:
            if task not in TASKS:
                raise UserError(f"task={task!r} is not one of {', '.join(TASKS)}")
        if len(self.task) not in (1, len(self.data_file)):
            raise UserError(
                f"{len(self.task)} tasks but {len(self.data_file)} data files; give one task, or "
                "one task per file"
            )
        if self.stride and self.max_length and self.stride > self.max_length:
            raise UserError(
                f"stride={self.stride} exceeds max_length={self.max_length}: tokens between "
                "windows would never be scored"
            )
        if self.predictions_file is not None and (
            self.task != ["squad"] or len(self.data_file) != 1
        ):
            raise UserError("--predictions_file belongs to --task squad with one data_file")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return (task, file) of each measurement."""
        tasks, files = self.task or [], self.data_file or []
        return list(zip(tasks * (len(files) // len(tasks)), files, strict=True))
