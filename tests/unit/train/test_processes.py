"""From flags to the network that a job trains."""

import numpy as np
import paddle
import pytest

from common.flags import load
from llm.config.finetune import FinetuneArguments
from llm.config.network import NetworkArguments
from llm.config.training import PretrainArguments
from llm.llama import build
from llm.llama.config import TINY_NAME
from llm.train.processes import network_options

TYPES = {
    "--bf16 true --fp16_opt_level O2": paddle.bfloat16,
    "--fp16 true --fp16_opt_level O2": paddle.float16,
    "--bf16 true": paddle.float32,
    "--bf16 true --fp16_opt_level O0": paddle.float32,
    "": paddle.float32,
}


@pytest.mark.parametrize("flags", TYPES)
@pytest.mark.parametrize("kind", [PretrainArguments, FinetuneArguments])
def test_a_network_is_built_in_its_final_type(monkeypatch, tmp_path, kind, flags):
    """Not in float32, to be cast when the trainer is made: references are scored before that."""
    monkeypatch.setattr(build, "_check_dtype", lambda *_: None)  # nothing is computed
    words = [*flags.split(), "--do_train", "true", "--device", "gpu", "--output_dir", tmp_path]
    words += ["--max_steps", 1]
    network, run = load([NetworkArguments, kind], list(map(str, words)), prog="test")
    model = build.load_model(TINY_NAME, **network_options(network, run))
    assert {parameter.dtype for parameter in model.parameters()} == {TYPES[flags]}
    wide = build.load_model(TINY_NAME)
    for ours, one in zip(model.parameters(), wide.parameters(), strict=True):
        found, wanted = (p.astype("float32").numpy() for p in (ours, one.astype(ours.dtype)))
        np.testing.assert_array_equal(found, wanted)
