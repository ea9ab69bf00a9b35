"""Megatron's checkpoints, put together a second way with NumPy, and damaged ones."""

import argparse
import os
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from llm.llama.config import PRESETS, load_config
from llm.llama.files.checkpoint import find_tensors, open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.megatron_writing import MegatronForm
from llm.llama.files.torch_files import read_torch
from tests.unit.llama.files.gguf_files import random_weights
from tests.unit.llama.files.models import as_arrays, write_model
from tests.unit.llama.files.torch_archives import dumps, made_of, save

CONFIG = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, num_hidden_layers=4, max_position_embeddings=64
)
LAYER = "model.layers.{}."
# How the three kinds of models call what a layer has: qkv, proj, fc1, fc2, norms.
SPELLINGS = {
    "core": (
        *("decoder.layers.{}.", "self_attention.linear_qkv.weight"),
        *("self_attention.linear_proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        *("input_layernorm.weight", "pre_mlp_layernorm.weight"),
    ),
    "transformer engine": (
        *("module.decoder.layers.{}.", "self_attention.linear_qkv.weight"),
        *("self_attention.linear_proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        *("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"),
    ),
    "older": (
        *("language_model.encoder.layers.{}.", "self_attention.query_key_value.weight"),
        *("self_attention.dense.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
        *("input_norm.weight", "post_attention_norm.weight"),
    ),
}
ENDS = {
    "core": ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"),
    "transformer engine": (
        "module.embedding.word_embeddings.weight",
        "module.decoder.final_layernorm.weight",
    ),
    "older": (
        "language_model.embedding.word_embeddings.weight",
        "language_model.encoder.final_norm.weight",
    ),
}


def inert(name):
    return name == "argparse.Namespace"


def args(config, **changes):
    fields = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "padded_vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_epsilon": config.rms_norm_eps,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "normalization": "RMSNorm",
        "swiglu": True,
    }
    return argparse.Namespace(**(fields | changes))


def layer(config, weights, index):
    """Matrices of a layer, whole: group by group, and gate and up apart."""
    own = {name.removeprefix(LAYER.format(index)): v for name, v in weights.items()}
    size, groups = config.head_dim, config.num_key_value_heads
    q, k, v = (own[f"self_attn.{one}_proj.weight"] for one in "qkv")
    rows = [np.split(one, groups) for one in (q, k, v)]
    assert rows[1][0].shape[0] == size
    qkv = np.concatenate([part for group in zip(*rows, strict=True) for part in group])
    return (
        qkv,
        own["self_attn.o_proj.weight"],
        (own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]),
        own["mlp.down_proj.weight"],
        own["input_layernorm.weight"],
        own["post_attention_layernorm.weight"],
    )


def write_ranks(directory, config, weights, spelling="core", ranks=1, stages=1, **changes):
    """Write mp_rank_XX as Megatron-LM does."""
    prefix, *names = SPELLINGS[spelling]
    iteration = directory / "iter_0000007"
    per_stage = config.num_hidden_layers // stages
    for rank in range(ranks):
        for stage in range(stages):
            model = {"some._extra_state": None, "rotary_pos_emb.inv_freq": np.ones(4, np.float32)}
            if stage == 0:
                rows = np.split(weights["model.embed_tokens.weight"], ranks)[rank]
                model[ENDS[spelling][0]] = rows
            for local in range(per_stage):
                found = layer(config, weights, stage * per_stage + local)
                qkv, proj, halves, fc2, *norms = found
                pieces = [
                    np.split(qkv, ranks)[rank],
                    np.split(proj, ranks, axis=1)[rank],
                    np.concatenate([np.split(half, ranks)[rank] for half in halves]),
                    np.split(fc2, ranks, axis=1)[rank],
                    *norms,
                ]
                model |= {
                    prefix.format(local) + name: piece
                    for name, piece in zip(names, pieces, strict=True)
                }
            if stage == stages - 1:
                model[ENDS[spelling][1]] = weights["model.norm.weight"]
                head = "output_layer.weight"
                if not config.tie_word_embeddings:
                    model[head] = np.split(weights["lm_head.weight"], ranks)[rank]
            name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if stages > 1 else "")
            (iteration / name).mkdir(parents=True)
            content = {"args": args(config, **changes), "model": _nested(model), "iteration": 7}
            (iteration / name / "model_optim_rng.pt").write_bytes(save(content))
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def _nested(model):
    """Older models lie in dictionaries of dictionaries."""
    if not any(name.startswith("language_model.") for name in model):
        return model
    inner = {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}
    for whole, values in model.items():
        name = whole.removeprefix("language_model.")
        if name.startswith("embedding."):
            inner["embedding"]["word_embeddings"]["weight"] = values
        elif name.startswith("encoder."):
            inner["encoder"][name.removeprefix("encoder.")] = values
        elif name.startswith("output_layer."):
            inner["output_layer"]["weight"] = values
    return {"language_model": inner}


def write_dist(directory, config, weights, ranks=2):
    """Write torch_dist: every piece an archive in a file of its rank, and the metadata."""
    place = directory / "iter_0000007"
    place.mkdir(parents=True)
    files = [b""] * ranks
    storage = {}

    def add(rank, name, offset, values):
        content = save(values)
        file = f"__{rank}_0.distcp"
        where = {"relative_path": file, "offset": len(files[rank]), "length": len(content)}
        index = made_of("MetadataIndex", fqn=name, offset=offset, index=None)
        storage[index] = made_of("_StorageInfo", **where)
        files[rank] += content

    prefix, *names = SPELLINGS["core"]
    prefix = prefix.replace("{}.", "")
    for index in range(config.num_hidden_layers):
        qkv, proj, halves, fc2, *norms = layer(config, weights, index)
        for name, values, axis in zip(
            names,
            (qkv, proj, np.concatenate(halves), fc2, *norms),
            (0, 1, 0, 1, None, None),
            strict=True,
        ):
            count = 1 if axis is None else 2 * ranks if "fc1" in name else ranks
            for number, piece in enumerate(np.split(values, count, axis=axis or 0)):
                offset = [index, *([0] * values.ndim)]
                offset[1 + (axis or 0)] = number * piece.shape[axis or 0]
                add(number % ranks, prefix + name, tuple(offset), piece[None])
    rows = {ENDS["core"][0]: "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
    for name, ours in rows.items():
        for rank, piece in enumerate(np.split(weights[ours], ranks)):
            add(rank, name, (rank * len(piece), 0), piece)
    add(0, ENDS["core"][1], (0,), weights["model.norm.weight"])
    storage[made_of("MetadataIndex", fqn="decoder._extra_state/shard_0", offset=None)] = None
    add(0, "optimizer.state.exp_avg.output_layer.weight", (0,), np.ones(3, np.float32))
    for rank, content in enumerate(files):
        (place / f"__{rank}_0.distcp").write_bytes(content)
    said, _ = dumps(made_of("Metadata", storage_data={k: v for k, v in storage.items() if v}))
    (place / ".metadata").write_bytes(said)
    (place / "common.pt").write_bytes(save({"args": args(config)}))
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def check(directory, weights, tmp_path):
    convert(open_checkpoint(directory), tmp_path / "hf")
    found = as_arrays(tmp_path / "hf")
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        assert found[name].tobytes() == values.tobytes(), name


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("ranks, stages", [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_rank_files_of_every_spelling(spelling, ranks, stages, tmp_path):
    weights = random_weights(CONFIG)
    write_ranks(tmp_path / "m", CONFIG, weights, spelling, ranks, stages)
    said = f"Megatron's files of {ranks} tensor parallel x {stages} pipeline ranks"
    assert open_checkpoint(tmp_path / "m").describe() == said
    check(tmp_path / "m", weights, tmp_path)


def test_tied_matrices_and_rotary_scaling(tmp_path):
    config = CONFIG.replace(tie_word_embeddings=True)
    weights = random_weights(config)
    changes = {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000}
    write_ranks(tmp_path / "m", config, weights, ranks=2, **changes)
    check(tmp_path / "m", weights, tmp_path)
    found = load_config(tmp_path / "hf")
    assert found.rope_theta == 500000 and found.rope_scaling.factor == 32
    with pytest.raises(UserError, match=r"convert_checkpoint\.py"):
        load_config(tmp_path / "m")


@pytest.mark.parametrize("ranks", [1, 2])
def test_torch_dist(ranks, tmp_path):
    weights = random_weights(CONFIG)
    write_dist(tmp_path / "m", CONFIG, weights, ranks)
    assert open_checkpoint(tmp_path / "m").describe() == "Megatron's torch_dist files"
    check(tmp_path / "m", weights, tmp_path)


@pytest.mark.parametrize("ranks, stages", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_written_ranks_hold_what_is_cut_by_hand(ranks, stages, tied, tmp_path):
    config = CONFIG.replace(tie_word_embeddings=tied)
    weights = random_weights(config)
    write_ranks(tmp_path / "hand", config, weights, "transformer engine", ranks, stages)
    convert(open_checkpoint(tmp_path / "hand"), tmp_path / "hf")
    form = MegatronForm(ranks, stages)
    convert(open_checkpoint(tmp_path / "hf"), tmp_path / "made", layout=form)
    hands = sorted((tmp_path / "hand" / "iter_0000007").glob("*/*.pt"))
    assert len(hands) == ranks * stages
    for hand in hands:
        made = tmp_path / "made" / "release" / hand.parent.name / hand.name
        with zipfile.ZipFile(made) as archive:
            assert archive.testzip() is None
        (theirs, place), (ours, own) = read_torch(hand, inert), read_torch(made, inert)
        wanted = {key.removeprefix("module."): value for key, value in theirs["model"].items()}
        found = ours["model"]
        if tied and stages > 1 and "decoder.final_layernorm.weight" in found:
            assert own("head", found.pop("output_layer.weight")).shape == (96 // ranks, 64)
        kept = {key for key in wanted if "layer" in key or "embeddings" in key}
        assert kept - {"some._extra_state"} == found.keys()
        for key, value in found.items():
            assert own(key, value).bits().tobytes() == place(key, wanted[key]).bits().tobytes()
    assert find_tensors(tmp_path / "made").keys() == weights.keys()  # as every script opens it
    (tmp_path / "made" / "config.json").unlink()  # the settings in the files say the same
    check(tmp_path / "made", weights, tmp_path / "again")
    assert load_config(tmp_path / "again" / "hf") == load_config(tmp_path / "hf")


def test_degrees_that_do_not_fit(tmp_path):
    source = write_model(tmp_path / "hf", CONFIG.replace(vocab_size=95))
    for form, said in (
        (MegatronForm(2, 1), "add --vocab_size 96"),
        (MegatronForm(1, 3), "does not divide the model's num_hidden_layers=4"),
    ):
        with pytest.raises(UserError, match=said):
            convert(open_checkpoint(source), tmp_path / "made", layout=form)


class Runs:
    """A pickle of it would run a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def _rank(directory, name="mp_rank_01"):
    return directory / "iter_0000007" / name / "model_optim_rng.pt"


RANK_DAMAGES = {
    "code": (lambda d: _rank(d).write_bytes(save({"model": Runs()})), "asks to load posix.system"),
    "no model": (lambda d: _rank(d).write_bytes(save({"weights": {}})), "no entry 'model'"),
    "interleaved": (lambda d: _rank(d).write_bytes(save({"model0": {}})), "interleaved stages"),
    "a rank missing": (lambda d: _rank(d, "mp_rank_00").unlink(), "lacks model_optim_rng.pt"),
    "a share twice": (
        lambda d: _rank(d).write_bytes(_rank(d, "mp_rank_00").read_bytes()),
        r"mp_rank_01/model_optim_rng\.pt holds the same numbers as \S+mp_rank_00",
    ),
    "cut": (lambda d: _rank(d).write_bytes(_rank(d).read_bytes()[:-99]), "cut off or damaged"),
    "no iteration": (
        lambda d: (d / "latest_checkpointed_iteration.txt").write_text("9"),
        "names iter_0000009, which is not there",
    ),
}


@pytest.mark.parametrize("name", RANK_DAMAGES)
def test_damaged_rank_files_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_ranks(tmp_path / "m", CONFIG, random_weights(CONFIG), ranks=2)
    change, said = RANK_DAMAGES[name]
    change(tmp_path / "m")
    with pytest.raises(UserError, match=said):
        convert(open_checkpoint(tmp_path / "m"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_layers": 3}, r"unexpected decoder\.layers\.3"),
        ({"num_layers": 5}, r"lacks decoder\.layers\.4"),
        ({"ffn_hidden_size": 88}, "has shape"),
        ({"normalization": "LayerNorm"}, "of no Llama"),
        ({"position_embedding_type": "learned_absolute"}, "not rotated"),
    ],
)
def test_settings_of_another_model_are_refused(changes, said, tmp_path):
    write_ranks(tmp_path / "m", CONFIG, random_weights(CONFIG), **changes)
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "m")


def test_damaged_torch_dist_is_refused(tmp_path):
    place = write_dist(tmp_path / "m", CONFIG, random_weights(CONFIG)) / "iter_0000007"
    file = place / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off"):
        open_checkpoint(tmp_path / "m")
    file.write_bytes(whole)
    (place / ".metadata").write_bytes(dumps(Runs())[0])
    with pytest.raises(UserError, match=r"posix\.system"):
        open_checkpoint(tmp_path / "m")
    (place / ".metadata").write_bytes(dumps(made_of("Metadata", storage_data={}))[0])
    with pytest.raises(UserError, match=r"lacks embedding\.word_embeddings"):
        open_checkpoint(tmp_path / "m")
    (place / "common.pt").unlink()
    with pytest.raises(UserError, match=r"put the model's config\.json beside it"):
        open_checkpoint(tmp_path / "m")
