"""Checkpoints that Megatron-Core writes, and ranks of ours that it reads: the same logits."""

import json

import numpy as np
import paddle
import pytest

from llm.llama.build import load_model
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.megatron_writing import MegatronForm
from tests.parity.ours import LOGIT_LIMIT

TIED = {"own output": False, "tied": True}
IDS = [1, 5, 60, 13, 7, 29, 42]


@pytest.fixture(scope="module")
def made(peer, tmp_path_factory):
    """What Megatron-Core saved, and the ranks made of it with what it says of them."""
    theirs, ours = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    for root in (theirs, ours):
        (root / "cases.json").write_text(json.dumps({"tied": TIED, "ids": IDS}))
    peer("write", theirs, "megatron_side")
    for name in TIED:
        convert(open_checkpoint(theirs / name), ours / name, layout=MegatronForm(1, 1))
    peer("read", ours, "megatron_side")
    return theirs, ours


def said(place):
    return np.array(json.loads((place / "logits.json").read_text()))


@pytest.mark.parametrize("name", TIED)
def test_its_checkpoints_say_here_what_they_say_there(made, name, tmp_path, measured):
    source = open_checkpoint(made[0] / name)
    assert source.describe() == "Megatron's torch_dist files"
    convert(source, tmp_path / "hf")
    with paddle.no_grad():
        logits = load_model(tmp_path / "hf").eval()(paddle.to_tensor([IDS])).numpy()
    error = float(np.abs(logits - said(made[0] / name)).max())
    assert np.abs(logits).max() > 0.1
    assert measured(f"megatron-core: {name}", "logits", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", TIED)
def test_it_reads_the_ranks_that_are_written_here(made, name):
    np.testing.assert_array_equal(said(made[1] / name), said(made[0] / name))
