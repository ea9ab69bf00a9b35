"""Scores of generated answers, by PaddleNLP's metrics and SQuAD's."""

import re
from typing import Any

from llm.evaluation.squad import SQUAD
from llm.train.logs import quiet_import

with quiet_import():
    from paddlenlp.metrics import BLEU, Rouge1, Rouge2, RougeL

# Chinese has no spaces between words, so each of its characters counts as one.
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")


def answer_scores(pairs: list[tuple[str, tuple[str, ...]]]) -> dict[str, float]:
    """Score answers.

    Args:
        pairs: each generated answer with the acceptable ones.

    Returns:
        ``exact_match`` and ``f1`` (SQuAD v1.1, best of the acceptable answers, 0 to 100), and
        PaddleNLP's ``rouge1``, ``rouge2``, ``rougel`` and ``bleu4`` on words against the first
        acceptable answer (0 to 1).
    """
    words = [(_WORD.findall(answer), _WORD.findall(wanted[0])) for answer, wanted in pairs]
    rougel, bleu = RougeL(), BLEU(n_size=4)
    for answer, wanted in words:
        rougel.add_inst(answer, [wanted])
        bleu.add_inst(answer, [wanted])
    answers, references = (list(column) for column in zip(*words, strict=True))
    return {
        "exact_match": 100 * sum(SQUAD.exact_match(a, w) for a, w in pairs) / len(pairs),
        "f1": 100 * sum(SQUAD.f1(a, w) for a, w in pairs) / len(pairs),
        "rouge1": _recall(Rouge1(), 1, answers, references),
        "rouge2": _recall(Rouge2(), 2, answers, references),
        "rougel": float(rougel.score()),
        # Its brevity penalty divides by the number of generated words.
        "bleu4": float(bleu.score()) if any(answers) else 0.0,
    }


def _recall(metric: Any, size: int, answers: list[list[str]], references: list[list[str]]) -> float:
    """ROUGE-n over all answers; 0 where no reference has n words, by which it would divide."""
    if all(len(words) < size for words in references):
        return 0.0
    return float(metric.score(answers, references))
