"""The training objective: answers only, and rows of several documents."""

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F

from data.conversations.instruct_dataset import PackedDataset, collate
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import load_config
from llm.train.objectives import next_token_objective

CONFIG = load_config("tiny-random-llama").replace(vocab_size=97, hidden_size=32)
LENGTHS = (5, 17, 1, 9, 30, 2, 8)


class Documents:
    """Random ids of unequal lengths, whose first half is a prompt."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.items = []
        for length in LENGTHS:
            ids, labels = rng.integers(0, 97, [2, length])
            labels[: length // 2] = -100
            self.items.append({"input_ids": ids, "labels": labels})
        self.lengths = np.array(LENGTHS)
        self.label_counts = np.array([(item["labels"] >= 0).sum() for item in self.items])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def tensors(batch):
    return {name: paddle.to_tensor(value) for name, value in batch.items()}


def loss_and_gradients(model, batch):
    model.clear_gradients()
    total, weight, _ = next_token_objective(model, tensors(batch))
    (total / weight).backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return total.item() / weight, weight, gradients


@pytest.mark.parametrize("flash", [False, True], ids=["reference", "tiled"])
@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefix"])
def test_a_packed_batch_trains_like_the_same_documents_padded(flash, prefix):
    model = build_model(CONFIG, seed=0, use_flash_attention=flash)
    if prefix:
        add_prefix(model, PrefixConfig(num_virtual_tokens=3), seed=0)
    documents = Documents()
    packed = PackedDataset(documents, 40)
    assert 1 < len(packed) < len(documents)
    padded = collate([documents[i] for i in range(len(documents))])
    rows = collate([packed[i] for i in range(len(packed))])
    one = loss_and_gradients(model, padded)
    other = loss_and_gradients(model, rows)
    assert one[0] == pytest.approx(other[0], rel=1e-6) and one[1] == other[1]
    assert one[2].keys() == other[2].keys() and len(one[2]) == (1 if prefix else 21)
    for name, gradient in one[2].items():
        np.testing.assert_allclose(other[2][name], gradient, atol=2e-6, err_msg=name)


def test_documents_of_a_row_that_see_each_other_would_differ():
    """The comparison above can fail: without segments the loss is another one."""
    model = build_model(CONFIG, seed=0)
    packed = PackedDataset(Documents(), 40)
    rows = collate([packed[i] for i in range(len(packed))])
    apart = loss_and_gradients(model, rows)[0]
    together = loss_and_gradients(model, rows | {"segments": np.zeros_like(rows["segments"])})[0]
    assert abs(apart - together) > 1e-4


def test_scoring_answers_only_changes_nothing():
    model = build_model(CONFIG, seed=0)
    model.eval()
    batch = collate([Documents()[i] for i in range(4)])
    total, weight, figures = next_token_objective(model, tensors(batch))
    logits = model(paddle.to_tensor(batch["input_ids"]))
    valid = batch["labels"] >= 0
    assert weight == valid.sum()
    exact = F.log_softmax(logits.astype("float64")).numpy()[valid]
    wanted = -exact[np.arange(len(exact)), batch["labels"][valid]].sum()
    assert total.item() == pytest.approx(wanted, rel=1e-6)
    correct = (logits.argmax(-1).numpy() == batch["labels"])[valid].sum()
    assert figures == {"accuracy": (correct, weight)}
    assert F.softmax(logits).isfinite().all()


def test_a_batch_without_labels_is_worth_nothing():
    model = build_model(CONFIG, seed=0)
    ids = paddle.ones([1, 4], dtype="int64")
    batch = {"input_ids": ids, "labels": paddle.full([1, 4], -100, dtype="int64")}
    total, weight, _ = next_token_objective(model, batch)
    assert total.item() == 0.0 and weight == 0.0
