"""Converted checkpoints, opened by PaddleNLP; PaddleNLP's own splits, and what it saves, read."""

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from llm.llama.build import load_model
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import CompleteForm, convert
from llm.llama.files.rank_layout import RankLayout
from tests.unit.llama.files.models import SHAPES, read_tensors, write_model

FUSIONS = [(False, False), (True, False), (False, True), (True, True)]
IDS = np.random.default_rng(0).integers(0, 96, [2, 20])
# PaddleNLP derives the size of a head from the hidden size.
MODELS = {name: SHAPES[name] for name in ("llama-2-gqa", "llama-3.1", "llama-3.2-tied")}


def opened(directory, qkv=False, ffn=False):
    """Load with PaddleNLP, which does not take fusions from config.json."""
    config = LlamaConfig.from_pretrained(directory)
    config.fuse_attention_qkv, config.fuse_attention_ffn = qkv, ffn
    model = LlamaForCausalLM.from_pretrained(directory, config=config)
    model.eval()
    return model


def logits(model):
    with paddle.no_grad():
        out = model(paddle.to_tensor(IDS))
    return (out if isinstance(out, paddle.Tensor) else out[0]).numpy()


@pytest.mark.parametrize("qkv, ffn", FUSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_paddlenlp_opens_it_and_splits_it_alike(tmp_path, name, qkv, ffn):
    source = write_model(tmp_path / "hf", MODELS[name])
    checkpoint = open_checkpoint(source)
    convert(checkpoint, tmp_path / "whole", layout=RankLayout(1, 1, qkv, ffn))
    convert(checkpoint, tmp_path / "ranks", layout=RankLayout(2, 1, qkv, ffn))
    model = opened(tmp_path / "whole", qkv, ffn)
    ours = load_model(source)
    ours.eval()
    np.testing.assert_allclose(logits(model), logits(ours), atol=1e-5)
    whole = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for rank in range(2):
        model.config.tensor_parallel_degree, model.config.tensor_parallel_rank = 2, rank
        actions = LlamaForCausalLM._get_tensor_parallel_mappings(model.config, is_split=True)
        file = tmp_path / "ranks" / f"model_state.tp0{rank}.pdparams"
        arrays = paddle.load(str(file), return_numpy=True)
        assert arrays.keys() == whole.keys()
        for key, value in whole.items():
            split = actions.get(key.removeprefix("llama."), lambda array: array)
            np.testing.assert_array_equal(arrays[key], split(value), err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_paddlenlp_saves_is_read(tmp_path, name, dtype):
    source = write_model(tmp_path / "hf", MODELS[name], dtype)
    convert(open_checkpoint(source), tmp_path / "ranks", layout=RankLayout())
    config = LlamaConfig.from_pretrained(tmp_path / "ranks")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "ranks", config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("model_state-*.pdparams"))) > 1
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_safetensors_of_either_side_are_read_by_the_other(tmp_path, name, dtype):
    source = write_model(tmp_path / "hf", MODELS[name], dtype)
    form = CompleteForm(fuse_qkv=name == "llama-3.1")
    convert(open_checkpoint(source), tmp_path / "made", layout=form, max_shard_bytes=40_000)
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 1
    config = LlamaConfig.from_pretrained(tmp_path / "made")
    config.fuse_attention_qkv = form.fuse_qkv
    model = LlamaForCausalLM.from_pretrained(tmp_path / "made", config=config, dtype=dtype)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    convert(open_checkpoint(tmp_path / "saved"), tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(source)
    assert load_model(tmp_path / "saved").config.vocab_size == MODELS[name].vocab_size
