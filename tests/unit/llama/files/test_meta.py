"""Meta's releases: shares made a second way with NumPy, both ways, and damaged ones."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from llm.llama.config import PRESETS, load_config
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.meta import MetaForm, file_name, meta_name
from llm.llama.files.torch_files import read_state_dict
from llm.llama.files.torch_writing import plan_torch
from tests.unit.llama.files.gguf_files import permuted
from tests.unit.llama.files.models import SHAPES, as_arrays, write_model

PLAIN = PRESETS["tiny-random-llama"].replace(vocab_size=96, num_hidden_layers=2)
MODELS = {
    "llama-2": (PLAIN.replace(max_position_embeddings=4096), "float16"),
    "llama-3.1": (
        PRESETS["tiny-llama-3.1"].replace(vocab_size=96, num_hidden_layers=2),
        "bfloat16",
    ),
    "tied": (PLAIN.replace(tie_word_embeddings=True, num_key_value_heads=4), "float32"),
}


def shares(config, weights, processes, rank, by_token):
    """What one process holds, cut by hand."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, values in weights.items():
        count = next((n for inner, n in heads.items() if f".{inner}." in name), None)
        rows = values if count is None else permuted(values, count)
        if rows.ndim == 2:
            across = any(part in name for part in ("o_proj", "down_proj"))
            across = across or ("embed_tokens" in name and not by_token)
            rows = np.split(rows, processes, axis=1 if across else 0)[rank]
        found[meta_name(name)] = rows
    if config.tie_word_embeddings:
        rows = np.split(weights["model.embed_tokens.weight"], processes)[rank]
        found["output.weight"] = rows
    return found


def read(file):
    """The tensors of a file, by the standard library: the archive's checksums hold, too."""
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        stored = [archive.read(f"archive/data/{n}") for n in range(len(archive.namelist()) - 3)]
    return dict(zip(read_state_dict(file), stored, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("by_token", [True, False], ids=["llama-3", "llama-2"])
@pytest.mark.parametrize("name", MODELS)
def test_both_ways(name, by_token, processes, tmp_path):
    config, dtype = MODELS[name]
    source = write_model(tmp_path / "source", config, dtype)
    (source / "tokenizer.model").write_bytes(b"vocabulary")
    weights = as_arrays(source)
    form = MetaForm(processes, by_token)
    convert(open_checkpoint(source), tmp_path / "meta", layout=form)
    names = {file_name(rank) for rank in range(processes)}
    assert {p.name for p in (tmp_path / "meta").iterdir()} == {
        *names,
        "params.json",
        "tokenizer.model",
    }
    for rank in range(processes):
        wanted = shares(config, weights, processes, rank, by_token)
        found = read(tmp_path / "meta" / file_name(rank))
        assert {key: value.tobytes() for key, value in wanted.items()} == found
    opened = open_checkpoint(tmp_path / "meta")
    assert opened.describe().startswith(f"Meta's files of {processes} process")
    convert(opened, tmp_path / "back")
    back = as_arrays(tmp_path / "back")
    if config.tie_word_embeddings and not by_token and processes > 1:
        back.pop("lm_head.weight")  # shares of columns and of rows cannot be compared
    assert back.keys() == weights.keys()
    assert all(back[key].tobytes() == value.tobytes() for key, value in weights.items())
    again = load_config(tmp_path / "back")
    for field in ("intermediate_size", "rope_scaling", "rope_theta", "max_position_embeddings"):
        assert getattr(again, field) == getattr(config, field), field
    assert json.loads((tmp_path / "meta/params.json").read_text())["n_layers"] == 2


def test_wide_archives_have_zip64_fields(tmp_path):
    """Gigabytes are stated without being written: only the directory is looked at."""
    rows = 1 << 21
    plan, offsets = plan_torch(
        tmp_path / "wide.pth", dict.fromkeys(("a", "b"), ((rows, 1024), "F32"))
    )
    with (tmp_path / "wide.pth").open("wb") as stream:
        stream.truncate(plan.size)  # a sparse file
        for offset, content in plan.around:
            stream.seek(offset)
            stream.write(content)
    found = read_state_dict(tmp_path / "wide.pth")
    assert {name: tensor.offset for name, tensor in found.items()} == offsets
    with zipfile.ZipFile(tmp_path / "wide.pth") as archive:
        assert archive.getinfo("archive/data/1").file_size == rows * 4096 > 1 << 32
        assert archive.getinfo("archive/data/1").header_offset > 1 << 32
    assert all(tensor.offset % 64 == 0 for tensor in found.values())


class Runs:
    """A pickle of it would print when it is loaded."""

    def __reduce__(self):
        return print, ("it ran",)


def archive(members, root="archive"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        for name, data in members.items():
            made.writestr(f"{root}/{name}", data)
    return content.getvalue()


def _one_file(directory):
    return directory / file_name(0)


def _edit(directory, change):
    file = _one_file(directory)
    file.write_bytes(change(file.read_bytes()))


def _params(directory, **changes):
    file = directory / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
SYSTEM = pickle.PROTO + b"\2cos\nsystem\n(Vtouch ran\ntR."
BAD = {
    "code": (lambda d: _edit(d, lambda c: archive({"data.pkl": SYSTEM})), "load os.system"),
    "a call": (
        lambda d: _edit(d, lambda c: archive({"data.pkl": pickle.dumps({"a": Runs()})})),
        "load builtins.print",
    ),
    "no tensor": (
        lambda d: _edit(d, lambda c: archive({"data.pkl": pickle.dumps({"a": 1})})),
        "'a' is no tensor",
    ),
    "no dictionary": (
        lambda d: _edit(d, lambda c: archive({"data.pkl": pickle.dumps([1])})),
        "dictionary of tensors",
    ),
    "big-endian": (
        lambda d: _edit(d, lambda c: archive({"data.pkl": b"", "byteorder": b"big"})),
        "big-endian machine",
    ),
    "a byte order without end": (
        lambda d: _edit(d, lambda c: archive({"data.pkl": b"", "byteorder": bytes(1 << 26)})),
        "big-endian machine",
    ),
    "another archive": (lambda d: _edit(d, lambda c: archive({"x": b""})), "no data.pkl"),
    "other headers": (
        lambda d: _edit(d, lambda c: c.replace(b"K\x03\x04", b"K\x03\x05")),
        "damaged",
    ),
    "an old format": (lambda d: _edit(d, lambda c: LEGACY), "before 1.6.*weights_only=True"),
    "git lfs": (lambda d: _edit(d, lambda c: b"version https://git-lfs"), "git lfs pull"),
    "cut": (lambda d: _edit(d, lambda c: c[:-200]), "cut off or damaged"),
    "no file": (lambda d: _one_file(d).unlink(), r"lacks consolidated\.00\.pth"),
    "the last missing": (lambda d: (d / file_name(1)).unlink(), "is one missing"),
    "a share twice": (
        lambda d: (d / file_name(1)).write_bytes(_one_file(d).read_bytes()),
        r"consolidated\.01\.pth holds the same numbers as \S+consolidated\.00\.pth",
    ),
    "no params": (lambda d: (d / "params.json").unlink(), "lacks params.json"),
    "a layer more": (lambda d: _params(d, n_layers=3), r"lacks layers\.2"),
    "another width": (lambda d: _params(d, dim=128), "vocab_size|shape"),
    "no width": (lambda d: _params(d, dim="64"), "dim have to be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_releases_are_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    change, said = BAD[name]
    source = write_model(tmp_path / "source", PLAIN)
    convert(open_checkpoint(source), tmp_path / "meta", layout=MetaForm(2))
    change(tmp_path / "meta")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        convert(open_checkpoint(tmp_path / "meta"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()


def test_what_meta_s_code_does_not_compute_is_refused(tmp_path):
    for number, (shape, processes, said) in enumerate(
        (
            ("biases", 1, "no biases"),
            ("llama-2-gqa", 3, "does not divide the model's num_key_value_heads=4"),
        )
    ):
        source = write_model(tmp_path / str(number), SHAPES[shape])
        with pytest.raises(UserError, match=said):
            convert(open_checkpoint(source), tmp_path / "out", layout=MetaForm(processes))
    with pytest.raises(UserError, match=r"convert_checkpoint\.py --input_dir"):
        (tmp_path / "meta").mkdir()
        (tmp_path / "meta" / file_name(0)).write_bytes(b"")
        load_config(tmp_path / "meta")
