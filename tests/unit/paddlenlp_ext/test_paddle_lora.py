"""PaddleNLP's LoRA directories: its own network with one, beside ours."""

import json

import numpy as np
import paddle
import pytest
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from llm.llama.adapters.opening import load_adapter
from llm.llama.build import load_model
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import CompleteForm, convert
from llm.llama.files.peft import read_config
from tests.unit.llama.files.models import SHAPES, write_model

IDS = np.random.default_rng(0).integers(0, 96, [2, 20])


def logits(model):
    model.eval()
    with paddle.no_grad():
        out = model(paddle.to_tensor(IDS))
    return (out if isinstance(out, paddle.Tensor) else out[0]).numpy()


def saved(tmp_path, **settings):
    """A model, and an adapter that PaddleNLP has saved: both directories, and its logits."""
    source = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"])
    convert(open_checkpoint(source), tmp_path / "paddle", layout=CompleteForm())
    config = LlamaConfig.from_pretrained(tmp_path / "paddle")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "paddle", config=config)
    targets = [".*q_proj.*", ".*v_proj.*", ".*down_proj.*"]
    model = LoRAModel(base, LoRAConfig(target_modules=targets, r=4, lora_alpha=16, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.set_value(paddle.randn(parameter.shape) / 10)
    model.save_pretrained(str(tmp_path / "lora"))
    return source, tmp_path / "lora", logits(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_answers_as_paddlenlp_s(rslora, tmp_path):
    source, adapter, wanted = saved(tmp_path, rslora=rslora)
    plain = load_model(source)
    without = logits(plain)
    found = logits(load_adapter(plain, adapter))
    assert np.abs(found - without).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_is_more_than_two_matrices_is_refused(tmp_path):
    _, adapter, _ = saved(tmp_path)
    file = adapter / "lora_config.json"
    raw = json.loads(file.read_text())
    for key, value, said in (
        ("pissa", True, "pissa=True.*merge it"),
        ("tensor_parallel_degree", 2, "tensor_parallel_degree=2.*save it whole"),
    ):
        file.write_text(json.dumps(raw | {key: value}))
        with pytest.raises(UserError, match=said):
            read_config(adapter)
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="is not 'PREFIX_TUNING'"):
        read_config(adapter, "PREFIX_TUNING")
    (adapter / "lora_model_state.pdparams").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match=r"asks to load os\.system"):
        read_config(adapter)
