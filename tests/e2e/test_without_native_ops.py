"""The scripts where nobody could compile the native ops: everything runs, and one line says so."""

import json
import sys

import numpy as np
import pytest

from common.errors import UserError
from data.corpus.token_store_writer import TokenStoreWriter
from external_ops import native
from llm.llama.build import load_model
from tests.e2e.training_process import run, together

TINY = "__internal_testing__/tiny-random-llama"
LINE = "the native ops are not built (pip install ./external_ops needs g++)"
# As if there were no such package.
WITHOUT = """
import runpy, sys
sys.modules["llama_paddle_ops"] = None
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def without(repo, tmp_path):
    """Run a script without the package; return what it said."""

    def start(script, *words):
        command = [sys.executable, "-c", WITHOUT, str(repo / script), *words]
        return run([*command, "--model_name_or_path", TINY, "--threads", "1"], repo).stderr

    return start


def test_training_and_prediction_run_and_say_so_once(without, tmp_path):
    with TokenStoreWriter(tmp_path / "store", np.uint16) as writer:
        for start in range(40):
            writer.add_document(np.arange(start, start + 200) % 1000)
    flags = "--do_train 1 --max_steps 2 --max_seq_length 32 --logging_steps 1 --warmup_steps 1"
    fast = "--use_flash_attention 1 --use_fused_rms_norm 1 --use_fused_head_and_loss_fn 1"
    places = ["--input_dir", str(tmp_path / "store"), "--output_dir", str(tmp_path / "out")]
    answers = tmp_path / "answers.jsonl"
    asked = ["--prompt", "a", "b", "--max_length", "4", "--output_file", str(answers)]
    said = together(
        lambda: without("run_pretrain.py", *flags.split(), *fast.split(), *places),
        lambda: without("predict_generation.py", *asked),
    )
    for text in said:
        assert text.count(LINE) == 1 and text.count("native") == 1, text
        assert LINE + "; ops run on plain Paddle operators" in text
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert len([json.loads(line) for line in answers.read_text("utf-8").splitlines()]) == 2


def test_asking_for_fused_kernels_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_paddle_ops", None)
    for cached in (native._load, native.reason):
        cached.cache_clear()
    try:
        with pytest.raises(UserError) as refused:
            load_model(TINY, ops={"swiglu": "fused"})
    finally:
        for cached in (native._load, native.reason):
            cached.cache_clear()
    assert str(refused.value) == f"no fused swiglu on cpu: {LINE}; or choose auto or reference"
