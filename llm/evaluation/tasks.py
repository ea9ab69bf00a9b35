"""The measurements of ``evaluate_generation.py``: data is read and checked before any model."""

from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.corpus.token_store import TokenStore
from data.tokenization.batch import encode_batch
from data.tokenizer import Tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.engine.finding import Found
from llm.engine.opening import OpenedModel
from llm.evaluation import asking, choices, exams, wikitext
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import Scorer
from llm.evaluation.task import Figures, Task
from llm.evaluation.text_files import read_texts


class PerplexityTask(Task):
    """Perplexity of a token store or of text."""

    name = "perplexity"

    def __init__(self, file: str, args: EvaluateArguments, tokenizer: Tokenizer) -> None:
        super().__init__(file)
        self.args = args
        if Path(file).is_file():
            self.documents = self._texts(Path(file), tokenizer)
        else:
            store = TokenStore.open(file)
            store.check_vocab(tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
            for name in ("wikitext_detokenize", "text_format"):
                if getattr(args, name) not in (False, "auto"):
                    raise UserError(f"{name} needs text, but {file} is a token store; drop it")
            count = min(store.num_documents, args.limit or store.num_documents)
            tokens = np.asarray(store.tokens[: store.starts[count]], dtype=np.int64)
            self.documents = [Document(tokens)]  # one stream, as in pretraining
            self.settings["format"] = "token store, one stream"

    def _texts(self, path: Path, tokenizer: Tokenizer) -> list[Document]:
        self.settings["format"], texts = read_texts(path, self.args.text_format)
        texts = texts[: self.args.limit]
        clean = wikitext.detokenize if self.args.wikitext_detokenize else str
        behind_bos = tokenizer.adds_bos
        self.settings["bos"] = "before each text" if behind_bos else "before none"
        encoded = encode_batch(tokenizer, [clean(text) for text in texts], add_bos=behind_bos)
        return [
            Document(np.asarray(ids), wikitext.count_words(text), len(text.encode()))
            for ids, text in zip(encoded, texts, strict=True)
        ]

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Score all documents."""
        length = self.args.max_length or scorer.max_length
        stride = self.args.stride or length
        measured = perplexity(scorer, self.documents, stride=stride, max_length=length)
        self.settings |= {
            "max_length": length,
            "stride": stride,
            "wikitext_detokenize": self.args.wikitext_detokenize,
            "documents": len(self.documents),
        }
        return measured.figures()


class ChoicesTask(Task):
    """Accuracy of multiple choice."""

    name = "choices"

    def __init__(self, file: str, args: EvaluateArguments, _: Tokenizer) -> None:
        super().__init__(file)
        files = [*(args.data_file or [file]), args.few_shot_file or ""]
        if args.answer_prompt is not None and not any(name.endswith(".csv") for name in files):
            raise UserError(
                f"answer_prompt={args.answer_prompt!r} ends the questions of .csv files, and "
                f"{file} has whole prompts; drop it"
            )
        items = choices.read_items(file, answer_prompt=args.answer_prompt)[: args.limit]
        shots: list[choices.Item] = []
        if args.few_shot_file is not None:
            shots = choices.read_items(args.few_shot_file, answer_prompt=args.answer_prompt)
            if len(shots) < args.num_few_shot:
                raise UserError(
                    f"num_few_shot={args.num_few_shot}, but {args.few_shot_file} has only "
                    f"{len(shots)} questions"
                )
            shots = shots[: args.num_few_shot]
        self.items = choices.with_shots(items, shots, args.description)
        self.settings = {
            "few_shot_file": args.few_shot_file,
            "num_few_shot": len(shots),
            "description": args.description,
            "first_prompt": self.items[0].prompt,
        }

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Answer all questions."""
        return _chosen(model, scorer, self.items)


class SubjectTask(Task):
    """Accuracy in one subject of a published set."""

    def __init__(self, name: str, paper: exams.Paper, args: EvaluateArguments) -> None:
        super().__init__(str(paper.file))
        self.name = name
        self.subject = paper.subject
        self.items = paper.items
        self.asked = [(item.prompt, item.choices, item.gold) for item in paper.items]
        self.settings = {
            "subject": paper.subject.name,
            "title": paper.subject.title,
            "categories": list(paper.subject.categories),
            "num_few_shot": args.num_few_shot,
            "limit": args.limit,
            "first_prompt": paper.items[0].prompt,
        }

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Answer the subject's questions."""
        return _chosen(model, scorer, self.items)


def _chosen(model: OpenedModel, scorer: Scorer, items: list[choices.Item]) -> Figures:
    before = scorer.truncated
    figures = choices.score(scorer, model.tokenizer, items)
    return figures | {"truncated": scorer.truncated - before}


MEASURES = {task.name: task.measure for task in (asking.SquadTask, asking.CmrcTask)}
TASKS: dict[str, type[Any]] = {
    task.name: task for task in (PerplexityTask, ChoicesTask, asking.SquadTask, asking.CmrcTask)
}


def read_tasks(args: EvaluateArguments, found: Found) -> list[Task]:
    """Read the data of every task.

    Raises:
        UserError: data that cannot be used.
        DataError: the same, found by ``data``.
    """
    if args.exam is not None:
        papers = exams.read_papers(
            args.exam,
            args.data_dir or "",
            shots=args.num_few_shot,
            only=args.subjects,
            limit=args.limit,
        )
        return [SubjectTask(args.exam, paper, args) for paper in papers]
    if args.alone is not None:
        return [*asking.question_tasks(args, found.tokenizer, found.context)]
    return [TASKS[name](file, args, found.tokenizer) for name, file in args.pairs]
