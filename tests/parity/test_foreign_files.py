"""Files of PyTorch, read; Meta's files and GGUF of ours, read by torch, transformers, llama.cpp."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from data.tokenization.training import train_sentencepiece
from data.tokenizer import load_tokenizer
from llm.llama.build import load_model
from llm.llama.config import PRESETS
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.gguf_writing import FILE_NAME, GGUFForm
from llm.llama.files.meta import MetaForm, meta_name
from tests.parity.ours import LOGIT_LIMIT
from tests.unit.llama.files.gguf_files import permuted
from tests.unit.llama.files.models import as_arrays, read_tensors, write_model

SMALL = PRESETS["tiny-random-llama"].replace(vocab_size=300, max_position_embeddings=256)
MODELS = {
    "plain": (SMALL, "float32"),
    "half": (SMALL, "float16"),
    "brain, tied": (SMALL.replace(tie_word_embeddings=True), "bfloat16"),
    "scaled": (PRESETS["tiny-llama-3.1"].replace(vocab_size=300), "float32"),
}
IDS, COUNT = [1, 5, 60, 130, 7, 299, 42], 24


@pytest.fixture(scope="module")
def files(peer, tmp_path_factory):
    """Every model as directory, .bin, Meta release and GGUF; and what the peers make of them."""
    root = tmp_path_factory.mktemp("sources")
    made = tmp_path_factory.mktemp("made")
    corpus = [f"word{n} It's {n * n} times {n}" for n in range(300)]
    vocabulary = train_sentencepiece(corpus, 290, tmp_path_factory.mktemp("t") / "tokenizer.model")
    for number, (config, dtype) in enumerate(MODELS.values()):
        source = write_model(root / str(number), config, dtype, seed=number)
        convert(open_checkpoint(source), made / f"meta-{number}", layout=MetaForm(2))
        form = GGUFForm(load_tokenizer(vocabulary), "small")
        convert(open_checkpoint(source), made / f"gguf-{number}", layout=form, dtype="float32")
        prompt = {"ids": IDS, "count": COUNT}
        (made / f"gguf-{number}" / "prompt.json").write_text(json.dumps(prompt))
    peer("write", root, "files_side")
    peer("read", made, "files_side")
    return root, made


@pytest.mark.parametrize("name", MODELS)
def test_pytorch_s_files_are_read(files, name, tmp_path):
    source = files[0] / str(list(MODELS).index(name))
    tensors = read_tensors(source)
    alone = tmp_path / "bin"
    alone.mkdir()
    for kept in ("config.json", "pytorch_model.bin"):
        (alone / kept).write_bytes((source / kept).read_bytes())
    assert open_checkpoint(alone).describe() == "1 PyTorch file"
    convert(open_checkpoint(alone), tmp_path / "back")
    assert read_tensors(tmp_path / "back") == tensors


@pytest.mark.parametrize("name", MODELS)
def test_torch_reads_meta_s_files(files, name):
    number, (config, _) = list(MODELS).index(name), MODELS[name]
    weights = as_arrays(files[0] / str(number))
    theirs = [load_file(files[1] / f"meta-{number}" / f"consolidated.0{r}.read") for r in (0, 1)]
    for tensor, values in weights.items():
        across = "o_proj" in tensor or "down_proj" in tensor
        found = [one[meta_name(tensor)] for one in theirs]
        whole = found[0] if values.ndim == 1 else np.concatenate(found, axis=1 if across else 0)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((n for inner, n in heads.items() if f".{inner}." in tensor), None)
        rows = values if count is None else permuted(values, count)
        np.testing.assert_array_equal(whole.astype(np.float32), rows.astype(np.float32), tensor)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_we_do_from_our_gguf(files, name, measured):
    if MODELS[name][0].rope_scaling.rope_type != "default":
        pytest.skip("transformers reads no factors from GGUF")
    place = files[1] / f"gguf-{list(MODELS).index(name)}"
    with paddle.no_grad():
        logits = load_model(place / FILE_NAME).eval()(paddle.to_tensor([IDS])).numpy()
    error = float(np.abs(logits - load_file(place / "hf.read")["logits"]).max())
    assert measured(f"gguf: {name}", "logits", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_we_do_from_our_gguf(files, name):
    place = files[1] / f"gguf-{list(MODELS).index(name)}"
    model, ids = load_model(place / FILE_NAME).eval(), list(IDS)
    with paddle.no_grad():
        for _ in range(COUNT):
            ids.append(int(model(paddle.to_tensor([ids])).numpy()[0, -1].argmax()))
    assert json.loads((place / "answer.json").read_text()) == ids[len(IDS) :]
