"""Directories that went through PaddleNLP's rank files and back, opened by transformers."""

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from llm.llama.build import load_model
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from tests.parity.ours import LOGIT_LIMIT
from tests.unit.llama.files.models import SHAPES, as_arrays, write_model

CASES = {
    "gqa, sharded": ("llama-2-gqa", {"dtype": "float16", "files": 3}, RankLayout(4, 2)),
    "llama 3.1": ("llama-3.1", {"dtype": "bfloat16"}, RankLayout(4, 2, fuse_qkv=True)),
    "tied": ("llama-3.2-tied", {}, RankLayout(2, 2)),
    "biases": ("biases", {"files": 2}, RankLayout(2, 1, fuse_qkv=True, fuse_ffn=True)),
}


@pytest.fixture(scope="module")
def opened(peer, tmp_path_factory):
    """Convert every case there and back, let transformers open all of them in one process."""
    root = tmp_path_factory.mktemp("converted")
    sources = tmp_path_factory.mktemp("sources")
    for number, (shape, options, layout) in enumerate(CASES.values()):
        source = write_model(sources / str(number), SHAPES[shape], seed=number, **options)
        ranks = sources / f"ranks-{number}"
        convert(open_checkpoint(source), ranks, layout=layout)
        convert(open_checkpoint(ranks), root / str(number), max_shard_bytes=30_000)
        ids = np.random.default_rng(number).integers(0, 96, [2, 40])
        save_file({"ids": ids}, root / str(number) / "ids.safetensors")
    peer("read", root)
    return root, sources


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_source_s_weights(opened, name, measured):
    root, sources = opened
    number = str(list(CASES).index(name))
    theirs = load_file(root / number / "hf.safetensors")
    for tensor, values in as_arrays(sources / number).items():
        wanted = values.astype(np.float32)
        np.testing.assert_array_equal(theirs[f"weight.{tensor}"], wanted, err_msg=tensor)
    model = load_model(sources / number)
    model.eval()
    ids = load_file(root / number / "ids.safetensors")["ids"]
    with paddle.no_grad():
        logits = model(paddle.to_tensor(ids)).numpy()
    error = float(np.abs(logits - theirs["logits"]).max())
    assert measured(f"converted: {name}", "logits", error) <= LOGIT_LIMIT
