"""Arguments of evaluation: what is measured, on which files."""

from dataclasses import dataclass, fields
from typing import ClassVar

from common.errors import UserError
from common.flags import arg
from llm.config.generation import OpenArguments

EXAMS = ("ceval", "cmmlu", "mmlu")  # published sets: a directory, subject by subject
QUESTIONS = ("gsm8k", "needle")  # many questions, each kept as soon as it is answered
ALONE = (*EXAMS, *QUESTIONS)  # measured by a command of their own, which goes on where it ended
TASKS = ("perplexity", "squad", "cmrc", "choices", *ALONE)
_OF_EXAMS = "task=" + "|".join(EXAMS)
_OF_QUESTIONS = "task=" + "|".join(QUESTIONS)
_OF_ANSWERS = "task=squad|cmrc"
_ANSWERING = f"{_OF_ANSWERS}|" + "|".join(QUESTIONS)
# Most tokens of an answer, where no flag says.
_ANSWER_TOKENS = {"gsm8k": 256}
_USUAL_ANSWER_TOKENS = 32
# What is measured, once each.
_NAMED_ONCE = ("subjects", "context_lengths", "depths")


@dataclass
class EvaluateArguments:
    """What to measure, on which files."""

    # The others only score texts, and neither talk nor keep a cache.
    ONLY_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        "cache_blocks": (_ANSWERING,),
        "prompt_lookup_num_tokens": (_ANSWERING,),
        "draft_model_name_or_path": (_ANSWERING,),
        "chat_template": (_ANSWERING,),
        "add_bos_token": ("task=" + "|".join(("perplexity", "choices", *ALONE)),),
    }
    # Answers that are there already need no model.
    NOT_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys((field.name for field in fields(OpenArguments)), ("predictions_file",)),
        # A score is of one adapter for all: --lora_path or --prefix_path.
        "adapters": ("task",),
    }

    task: list[str] | None = arg(
        None,
        "perplexity, squad, cmrc, choices: one, or one per file; or one of ceval, cmmlu, mmlu, "
        "gsm8k, needle",
    )
    data_file: list[str] | None = arg(
        None,
        "one or more files per task: perplexity takes a token store, .txt or .jsonl; squad SQuAD "
        "or instruction data, and so cmrc; choices .jsonl or .csv; gsm8k one file with question "
        "and answer; needle text to hide it in, Python's documentation when not given",
    )
    data_dir: str | None = arg(
        None,
        "ceval, cmmlu, mmlu: the set as published, with directories dev, val and test",
        only_with=_OF_EXAMS,
    )
    subjects: list[str] | None = arg(
        None, "ceval, cmmlu, mmlu: only these subjects, by their files' names", only_with=_OF_EXAMS
    )
    output_file: str | None = arg(None, "write figures and settings here as JSON")
    predictions_file: str | None = arg(
        None,
        "squad, cmrc: score these answers (JSON, id to text) instead of asking a model",
        only_with=_OF_ANSWERS,
    )
    limit: int | None = arg(
        None,
        "use only the first questions (of each subject) or documents",
        minimum=1,
        not_with=("predictions_file", "task=needle"),
    )
    batch_size: int = arg(
        8, "texts that run together", minimum=1, not_with=("predictions_file", "task=needle")
    )
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
        None,
        "choices, gsm8k: solved examples to show before each question",
        only_with="task=choices|gsm8k",
    )
    num_few_shot: int = arg(
        5,
        "how many solved examples to show: choices and gsm8k of few_shot_file, ceval, cmmlu and "
        "mmlu of the subject's dev file",
        minimum=0,
        only_with=("task=choices|gsm8k|" + "|".join(EXAMS), "few_shot_file|data_dir"),
    )
    few_shot_seed: int | None = arg(
        None,
        "gsm8k: draw other examples for each question; 1234 draws what lm-evaluation-harness does. "
        "The first ones when not given, which the cache then holds for all",
        minimum=0,
        only_with=("task=gsm8k", "few_shot_file"),
    )
    apply_chat_template: bool = arg(
        False,
        "gsm8k, needle: ask through the chat template, in place of a text to go on from",
        only_with=_OF_QUESTIONS,
    )
    context_lengths: list[int] | None = arg(
        None,
        "needle: tokens of the contexts, answer included; the model's context and its halves down "
        "to an eighth when not given",
        minimum=1,
        only_with="task=needle",
    )
    depths: list[float] | None = arg(
        None,
        "needle: where it is hidden, in percent of the text; 0 25 50 75 100 when not given",
        minimum=0,
        maximum=100,
        only_with="task=needle",
    )
    num_trials: int = arg(
        1, "needle: how many for each length and depth", minimum=1, only_with="task=needle"
    )
    description: str = arg("", "choices: text before the examples", only_with="task=choices")
    answer_prompt: str | None = arg(
        None,
        "choices: last line of a csv question; by the file's language when not given",
        only_with="task=choices",
    )
    max_answer_tokens: int | None = arg(
        None,
        "squad, cmrc, gsm8k, needle: most tokens of an answer; 32, of gsm8k 256",
        minimum=1,
        only_with=_ANSWERING,
        not_with="predictions_file",
    )
    stop: list[str] | None = arg(
        None,
        "squad, cmrc, gsm8k, needle: texts that end an answer; of gsm8k the harness's when not "
        "given",
        only_with=_ANSWERING,
        not_with="predictions_file",
    )

    def validate(self) -> None:
        """Refuse tasks and files that do not pair up, and flags without their task.

        Raises:
            UserError: the message names the flag and the fix.
        """
        for task in self.task or ():
            if task not in TASKS:
                raise UserError(f"task={task!r} is not one of {', '.join(TASKS)}")
        for flag in _NAMED_ONCE:
            values = getattr(self, flag)
            if values == []:
                raise UserError(f"{flag} is an empty list: name at least one, or drop it")
            twice = [value for value in values or () if values.count(value) > 1]
            if twice:
                raise UserError(f"{flag}={twice[0]} is given twice; drop one of them")
        if self.alone is not None:
            self._check_alone(self.alone)
            return
        if not self.task or not self.data_file:
            raise UserError(
                "--task and --data_file are needed, as in --task perplexity --data_file text.txt"
            )
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
            self.task not in (["squad"], ["cmrc"]) or len(self.data_file) != 1
        ):
            raise UserError("--predictions_file belongs to --task squad or cmrc with one data_file")

    def _check_alone(self, name: str) -> None:
        if self.task != [name]:
            raise UserError(
                f"task={' '.join(self.task or [])!r}: {name} is measured alone; give the others a "
                "command of their own"
            )
        if name in EXAMS and self.data_file:
            raise UserError(
                f"--task {name} reads a directory: give --data_dir in place of --data_file"
            )
        if name in EXAMS and not self.data_dir:
            raise UserError(
                f"--task {name} needs --data_dir, the directory of the set as it is published"
            )
        if name == "gsm8k" and len(self.data_file or []) != 1:
            raise UserError(
                f"--task gsm8k measures one --data_file, not {len(self.data_file or [])}"
            )

    def check_beside(self, opening: OpenArguments) -> None:
        """Refuse what flags of the model mean nothing beside these.

        Raises:
            UserError: the message names the flag and the fix.
        """
        if self.alone in QUESTIONS and opening.chat_template and not self.apply_chat_template:
            raise UserError(
                f"chat_template is given, but --task {self.alone} goes on from a text; add "
                "--apply_chat_template, or drop chat_template"
            )
        if self.apply_chat_template and opening.add_bos_token is not None:
            raise UserError(
                "add_bos_token has no effect beside apply_chat_template, whose template writes its "
                "own; drop one of them"
            )

    @property
    def alone(self) -> str | None:
        """Return the task that is measured alone, if there is one."""
        return next((task for task in self.task or () if task in ALONE), None)

    @property
    def answer_tokens(self) -> int:
        """Return the most tokens of an answer."""
        usual = _ANSWER_TOKENS.get(self.alone or "", _USUAL_ANSWER_TOKENS)
        return usual if self.max_answer_tokens is None else self.max_answer_tokens

    @property
    def exam(self) -> str | None:
        """Return the published set that is measured, if there is one."""
        return next((task for task in self.task or () if task in EXAMS), None)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Return (task, file) of each measurement."""
        tasks, files = self.task or [], self.data_file or []
        return list(zip(tasks * (len(files) // len(tasks)), files, strict=True))
