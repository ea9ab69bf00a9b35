"""The measurements of ``evaluate_generation.py``: data is read and checked before any model."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from data.conversations.instruct import read_examples
from data.corpus.readers import BOM, detect_format, make_reader
from data.corpus.token_store import TokenStore
from data.tokenization.batch import encode_batch
from data.tokenizer import Tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.engine.opening import OpenedModel
from llm.engine.request import SamplingParams, requests
from llm.engine.texts import generate_texts
from llm.evaluation import choices, squad, wikitext
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import Scorer

Figures = dict[str, float]


class Task(ABC):
    """One measurement on one file, its data read."""

    name: str

    def __init__(self, file: str) -> None:
        self.file = file
        self.settings: dict[str, Any] = {}

    @abstractmethod
    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Measure a model.

        Raises:
            UserError: data that does not fit the model.
        """


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
        form = self.args.text_format
        if form == "auto":
            form = detect_format(path, "Give the file one of these endings")
        self.settings["format"] = form
        hint = "perplexity reads the text under that key: rename yours"
        reader = make_reader(form, json_key="text", txt_documents="file", key_hint=hint)
        found = reader.read(path.read_bytes().removeprefix(BOM))
        if found.bad:
            line, reason = found.bad[0]
            raise UserError(f"{path}:{line}: {reason}")
        if not found.texts:
            raise UserError(f"{path} has no text")
        texts = found.texts[: self.args.limit]
        clean = wikitext.detokenize if self.args.wikitext_detokenize else str
        has_bos = tokenizer.bos_id is not None
        encoded = encode_batch(tokenizer, [clean(text) for text in texts], add_bos=has_bos)
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
            "bos": "before each text, where the tokenizer has one",
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
        before = scorer.truncated
        figures = choices.score(scorer, model.tokenizer, self.items)
        return figures | {"truncated": scorer.truncated - before}


class SquadTask(Task):
    """Exact match and F1 of greedily generated answers."""

    name = "squad"

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
            "max_answer_tokens": args.max_answer_tokens,
            "stop": args.stop or [],
            "decode_strategy": "greedy_search",
            "first_prompt": tokenizer.decode(self.prompts[0], skip_special=False),
        }

    def run(self, model: OpenedModel, scorer: Scorer) -> Figures:
        """Ask all questions that fit; the others count as wrong."""
        room = model.context - self.args.max_answer_tokens
        asked = [n for n, prompt in enumerate(self.prompts) if len(prompt) <= room]
        if not asked:
            raise UserError(
                f"the shortest prompt of {self.file} has {min(map(len, self.prompts))} tokens, but "
                f"the context of {model.context} leaves {room} beside max_answer_tokens="
                f"{self.args.max_answer_tokens}"
            )
        prompts = [self.prompts[number] for number in asked]
        longest = max(map(len, prompts)) + self.args.max_answer_tokens
        engine = model.open_engine(min(self.args.batch_size, len(prompts)), longest)
        params = SamplingParams(max_new_tokens=self.args.max_answer_tokens, temperature=0)
        decoders = [model.decoder() for _ in prompts]
        stops = [self.args.stop or []] * len(prompts)
        texts = generate_texts(engine, requests(prompts, params), decoders, stops)
        pairs = [(text, self.answers[number]) for text, number in zip(texts, asked, strict=True)]
        figures = squad.score_pairs(pairs, len(self.prompts))
        return figures | {"too_long": len(self.prompts) - len(asked)}


TASKS: dict[str, type[Any]] = {task.name: task for task in (PerplexityTask, ChoicesTask, SquadTask)}


def read_tasks(args: EvaluateArguments, tokenizer: Tokenizer) -> list[Task]:
    """Read the data of every task.

    Raises:
        UserError: data that cannot be used.
        DataError: the same, found by ``data``.
    """
    return [TASKS[name](file, args, tokenizer) for name, file in args.pairs]
