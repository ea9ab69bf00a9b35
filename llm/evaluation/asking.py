"""Measurements whose answers are generated, greedily: SQuAD, CMRC, GSM8K, needles in haystacks."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from data.conversations.instruct import read_examples
from data.tokenization.chat import Message
from data.tokenizer import Tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.engine.opening import OpenedModel
from llm.engine.request import SamplingParams, requests
from llm.engine.texts import generate_texts
from llm.evaluation import gsm8k, needle, squad
from llm.evaluation.cmrc import CMRC
from llm.evaluation.scorer import Scorer
from llm.evaluation.squad import SQUAD
from llm.evaluation.task import Figures, Task
from llm.evaluation.text_files import documentation, library_modules, read_texts


class SquadTask(Task):
    """Exact match and F1 of answers, as SQuAD has them."""

    name = "squad"
    measure = SQUAD

    def __init__(self, file: str, args: EvaluateArguments, tokenizer: Tokenizer) -> None:
        super().__init__(file)
        self.args = args
        examples = read_examples([file])[: args.limit]
        self.answers = [example.answers for example in examples]
        # The ids that training puts before the answer, and serving too.
        self.prompts = [
            tokenizer.apply_chat_template(
                list(example.prompt), **({"tools": list(example.tools)} if example.tools else {})
            )
            for example in tqdm(examples, "prompts", disable=None, leave=False)
        ]
        self.settings = {
            "chat_template": tokenizer.chat_template,
            "max_answer_tokens": args.answer_tokens,
            "stop": args.stop or [],
            "decode_strategy": "greedy_search",
            "first_prompt": tokenizer.decode(self.prompts[0], skip_special=False),
        }

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Ask all questions that fit; the others count as wrong."""
        room = model.context - self.args.answer_tokens
        asked = [n for n, prompt in enumerate(self.prompts) if len(prompt) <= room]
        if not asked:
            raise UserError(
                f"the shortest prompt of {self.file} has {min(map(len, self.prompts))} tokens, but "
                f"the context of {model.context} leaves {room} beside max_answer_tokens="
                f"{self.args.answer_tokens}"
            )
        prompts = [self.prompts[number] for number in asked]
        longest = max(map(len, prompts)) + self.args.answer_tokens
        engine = model.open_engine(min(self.args.batch_size, len(prompts)), longest)
        params = SamplingParams(max_new_tokens=self.args.answer_tokens, temperature=0)
        decoders = [model.decoder() for _ in prompts]
        stops = [self.args.stop or []] * len(prompts)
        texts = generate_texts(engine, requests(prompts, params), decoders, stops)
        pairs = [(text, self.answers[number]) for text, number in zip(texts, asked, strict=True)]
        figures = squad.score_pairs(pairs, len(self.prompts), self.measure)
        return figures | {"too_long": len(self.prompts) - len(asked)}


class CmrcTask(SquadTask):
    """The same of Chinese answers, as CMRC 2018 has them."""

    name = "cmrc"
    measure = CMRC


class QuestionTask(Task):
    """One question of many that are answered together, and kept as they come.

    Args:
        file: where it is from.
        tokenizer: of the model.
        args: how to answer.
        asked: the prompt: turns for the chat template, or a text to go on from.
        stop: texts that end an answer where the flags name none.

    Attributes:
        group: those with the same one are answered together.
        at_once: most that run together; as many as the flags say when None.
        may_be_cut: whether a prompt without room loses its beginning, as in the harness.
    """

    at_once: int | None = None
    may_be_cut = False

    def __init__(
        self,
        file: str,
        tokenizer: Tokenizer,
        args: EvaluateArguments,
        asked: str | Sequence[Message],
        stop: Sequence[str],
    ) -> None:
        super().__init__(file)
        self.prompt = encode_prompt(tokenizer, asked)
        self.max_new_tokens = args.answer_tokens
        self.stop = list(stop if args.stop is None else args.stop)
        self.asked = asked
        self.shared = {
            "chat_template": tokenizer.chat_template if args.apply_chat_template else None,
            "max_answer_tokens": self.max_new_tokens,
            "stop": self.stop,
            "decode_strategy": "greedy_search",
        }

    @abstractmethod
    def score(self, answer: str) -> Figures:
        """Score a generated answer, and note in the settings what was read in it."""

    def fitted(self, context: int) -> list[int]:
        """Return the ids to go on from in a model's context.

        Raises:
            UserError: no room, where none may be made.
        """
        room = check_room(self.max_new_tokens, context)
        if len(self.prompt) > room and not self.may_be_cut:
            raise UserError(
                f"a prompt has {len(self.prompt)} tokens, but the model's context of {context} "
                f"leaves {room} beside max_answer_tokens={self.max_new_tokens}"
            )
        return self.prompt[-room:]

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Answer this question alone."""
        kept: list[Figures] = []
        ask(model, [self], 1, lambda _, figures: kept.append(figures))
        return kept[0]


def check_room(answer: int, context: int) -> int:
    """Return the tokens that an answer leaves for its prompt.

    Raises:
        UserError: none.
    """
    if answer >= context:
        raise UserError(
            f"max_answer_tokens={answer} leaves no room for a prompt in the model's context of "
            f"{context}"
        )
    return context - answer


def encode_prompt(tokenizer: Tokenizer, asked: str | Sequence[Message]) -> list[int]:
    """Return the ids of a prompt: a text that is gone on from, or turns for the template."""
    if isinstance(asked, str):
        return tokenizer.encode_prompt(asked)
    return tokenizer.apply_chat_template(list(asked))


def ask(
    model: OpenedModel,
    questions: Sequence[QuestionTask],
    batch_size: int,
    keep: Callable[[int, Figures], None],
) -> None:
    """Answer questions together, greedily.

    Args:
        model: what is asked.
        questions: at least one.
        batch_size: answers that are generated at once.
        keep: takes the number of a question and its figures as soon as it is answered.

    Raises:
        UserError: a prompt without room in the model's context; before any is answered.
    """
    prompts = [question.fitted(model.context) for question in questions]
    params = [
        SamplingParams(max_new_tokens=question.max_new_tokens, temperature=0)
        for question in questions
    ]
    asked = requests(prompts, params)
    together = min(questions[0].at_once or batch_size, len(asked))
    engine = model.open_engine(together, max(request.max_length for request in asked))

    def done(number: int, answer: str) -> None:
        question = questions[number]
        question.settings["answer"] = answer
        cut = len(prompts[number]) < len(question.prompt)
        keep(number, question.score(answer) | {"truncated": int(cut)})

    stops = [question.stop for question in questions]
    generate_texts(engine, asked, [model.decoder() for _ in asked], stops, done)


class ProblemTask(QuestionTask):
    """One problem of GSM8K."""

    name = "gsm8k"
    may_be_cut = True

    def __init__(
        self,
        number: int,
        problem: gsm8k.Problem,
        examples: Sequence[gsm8k.Problem],
        args: EvaluateArguments,
        tokenizer: Tokenizer,
    ) -> None:
        ways = gsm8k.conversation if args.apply_chat_template else gsm8k.prompt
        asked = ways(problem, examples)
        super().__init__((args.data_file or [""])[0], tokenizer, args, asked, gsm8k.STOP)
        self.problem = problem
        self.shared |= {
            "few_shot_file": args.few_shot_file,
            "num_few_shot": len(examples),
            "few_shot_seed": args.few_shot_seed,
            "limit": args.limit,
        }
        self.settings = {"number": number, "question": problem.question, "right": problem.answer}

    def score(self, answer: str) -> Figures:
        """Return whether the number at the end is right, strictly and flexibly read."""
        self.settings["strict"] = gsm8k.strict(answer)
        self.settings["flexible"] = gsm8k.flexible(answer)
        return gsm8k.score(answer, self.problem)


def question_tasks(
    args: EvaluateArguments, tokenizer: Tokenizer, context: int
) -> list[QuestionTask]:
    """Return the questions of a task that is measured alone; the first one's prompt is a setting.

    Raises:
        UserError: see :func:`problem_tasks` and :func:`needle_tasks`.
        DataError: likewise.
    """
    made = {"gsm8k": problem_tasks, "needle": needle_tasks}[args.alone or ""]
    tasks: list[QuestionTask] = list(made(args, tokenizer, context))
    tasks[0].shared["first_prompt"] = tokenizer.decode(tasks[0].prompt, skip_special=False)
    return tasks


def problem_tasks(
    args: EvaluateArguments, tokenizer: Tokenizer, context: int
) -> Iterator[QuestionTask]:
    """Yield the problems of a file.

    Args:
        args: files, examples and how to answer.
        tokenizer: of the model.
        context: of the model, in tokens.

    Raises:
        UserError: too few examples, no room for a prompt, or no chat template where one is to be
            applied.
        DataError: a record that is no problem, by line.
    """
    check_room(args.answer_tokens, context)
    (file,) = args.data_file or [""]
    problems = gsm8k.read_problems(file)[: args.limit]
    pool: list[gsm8k.Problem] = []
    if args.few_shot_file is not None:
        pool = gsm8k.read_problems(args.few_shot_file)
        gsm8k.check_examples(pool, args.num_few_shot, args.few_shot_file)
    count = args.num_few_shot if pool else 0
    examples = gsm8k.draw_examples(pool, count, len(problems), args.few_shot_seed)
    pairs = zip(problems, examples, strict=True)
    bar = tqdm(pairs, "prompts", total=len(problems), disable=None, leave=False, delay=2)
    for number, (problem, shown) in enumerate(bar, 1):
        yield ProblemTask(number, problem, shown, args, tokenizer)


class NeedleTask(QuestionTask):
    """One needle in one haystack."""

    name = "needle"
    # The cache of one long context is much; what the next one shares with it is found there.
    at_once = 1

    def __init__(
        self, files: str, trial: needle.Trial, args: EvaluateArguments, tokenizer: Tokenizer
    ) -> None:
        asked = needle_prompt(trial.text, trial.question, chat=args.apply_chat_template)
        stop = () if args.apply_chat_template else ("\n",)
        super().__init__(files, tokenizer, args, asked, stop)
        self.trial = trial
        self.group = trial.length
        self.settings = {
            "context_length": trial.length,
            "depth": trial.depth,
            "trial": trial.index,
            "needle": trial.needle,
            "place": trial.place,
            "tokens": len(self.prompt),
        }

    def score(self, answer: str) -> Figures:
        """Return whether the number was found."""
        return {"found": float(needle.is_found(answer, self.trial.number))}


def needle_prompt(text: str, question: str, *, chat: bool) -> str | list[Message]:
    """Return the question behind its text: as one turn, or as a text to go on from."""
    whole = f"{text}\n\n{question}"
    return [{"role": "user", "content": whole}] if chat else whole


def needle_tasks(
    args: EvaluateArguments, tokenizer: Tokenizer, context: int
) -> Iterator[QuestionTask]:
    """Yield every needle that is looked for, length by length.

    Args:
        args: lengths, depths and the text.
        tokenizer: of the model.
        context: of the model, in tokens.

    Raises:
        UserError: a length beyond the context or the text, or without room for any.
    """
    lengths = args.context_lengths or needle.default_lengths(context)
    for length in lengths:
        if length > context:
            raise UserError(
                f"context_lengths={length} exceeds the model's context of {context}; give shorter "
                "ones"
            )
    files = args.data_file or []
    texts = [text for file in files for text in read_texts(Path(file))[1]]
    chat = args.apply_chat_template
    trials = needle.make_trials(
        "\n\n".join(texts or documentation(library_modules())),
        sorted(lengths),
        args.depths or needle.DEPTHS,
        args.num_trials,
        answer=args.answer_tokens,
        context=context,
        chat=chat,
        count=lambda text, question: len(
            encode_prompt(tokenizer, needle_prompt(text, question, chat=chat))
        ),
    )
    place = " ".join(files) or "documentation of Python's standard library"
    for trial in tqdm(trials, "haystacks", disable=None, leave=False, delay=2):
        yield NeedleTask(place, trial, args, tokenizer)
