"""What cannot be converted: each case is refused by name, and nothing is written."""

import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from common.errors import UserError
from common.flags import load
from data.tokenizer import load_tokenizer
from llm.config.tools import ConvertArguments
from llm.llama.files import conversion
from llm.llama.files.checkpoint import find_tensors, open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.gguf_writing import GGUFForm
from llm.llama.files.megatron_writing import MegatronForm
from llm.llama.files.meta import MetaForm
from llm.llama.files.rank_layout import RankLayout
from tests.unit.llama.files.models import SHAPES, read_tensors, write_model

CONFIG = SHAPES["llama-2-gqa"]
Q_PROJ = "llama.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One model in both layouts."""
    root = tmp_path_factory.mktemp("checkpoints")
    source = write_model(root / "hf", CONFIG)
    convert(open_checkpoint(source), root / "ranks", layout=RankLayout(2, 2))
    return root


@pytest.fixture
def ranks(checkpoints, tmp_path):
    """A copy of the rank files, to be damaged."""
    return shutil.copytree(checkpoints / "ranks", tmp_path / "ranks")


def change(file, edit):
    """Load a rank file with paddle, change its dictionary, save it."""
    arrays = paddle.load(str(file), return_numpy=True)
    edit(arrays)
    with file.open("wb") as stream:
        pickle.dump(arrays, stream, protocol=4)


def without(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def edited(name, edit):
    return lambda directory: change(directory / name, edit)


def set_config(**changes):
    def edit(directory):
        file = directory / "config.json"
        raw = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps(raw), encoding="utf-8")

    return edit


def cut(name, keep):
    def edit(directory):
        file = directory / name
        file.write_bytes(file.read_bytes()[:keep])

    return edit


def both_layouts(directory):
    (directory / "model.safetensors").write_bytes(b"")


def foreign_name(directory):
    (directory / "model_state.rank3.pdparams").write_bytes(b"")


def with_code(directory):
    (directory / "model_state.tp01_pp00.pdparams").write_bytes(pickle.dumps({"w": print}, 4))


def one_shard(directory):
    file = directory / "model_state.tp01_pp01.pdparams"
    file.rename(directory / "model_state.tp01_pp01-00001-of-00002.pdparams")


def narrower(arrays):
    arrays[Q_PROJ] = arrays[Q_PROJ][:, :-1]


DAMAGE = {
    "a rank is missing": (
        without("model_state.tp01_pp00.pdparams"),
        r"lacks model_state\.tp01_pp00\.pdparams.*2 tensor parallel x 2 pipeline",
    ),
    "the last rank is missing": (
        without("model_state.tp01_pp00.pdparams", "model_state.tp01_pp01.pdparams"),
        r"lacks model_state\.tp01_pp00\.pdparams",
    ),
    "a shard is missing": (one_shard, r"lacks model_state\.tp01_pp01-00002-of-00002\.pdparams"),
    "ranks of different shapes": (
        edited("model_state.tp01_pp00.pdparams", narrower),
        r"q_proj.weight has shape \[48, 24\] in model_state.tp00_pp00.pdparams but \[48, 23\]",
    ),
    "ranks of different types": (
        edited(
            "model_state.tp01_pp00.pdparams",
            lambda arrays: arrays.update({Q_PROJ: arrays[Q_PROJ].astype(np.float16)}),
        ),
        r"q_proj.weight has type F32 in model_state.tp00_pp00.pdparams but F16 in",
    ),
    "ranks of different names": (
        edited("model_state.tp01_pp00.pdparams", lambda arrays: arrays.pop(Q_PROJ)),
        rf"ranks 0 and 1 do not hold the same arrays: only one of them has {Q_PROJ}",
    ),
    "a stage of another rank's": (
        lambda directory: shutil.copyfile(
            directory / "model_state.tp00_pp01.pdparams",
            directory / "model_state.tp01_pp01.pdparams",
        ),
        r"tp01_pp01\.pdparams holds the same numbers as \S+tp00_pp01\.pdparams",
    ),
    "another model's config": (set_config(hidden_size=64), r"shape .* the config asks for"),
    "more layers than files": (
        set_config(num_hidden_layers=5),
        r"lacks llama\.layers\.4.* and 6 more: config.json describes another model",
    ),
    "fewer layers than files": (set_config(num_hidden_layers=3), r"has unexpected llama.layers.3"),
    "code": (with_code, r"asks to load builtins\.print; .* would run code"),
    "a cut file": (cut("model_state.tp00_pp01.pdparams", 3000), r"is cut off: an array ends"),
    "an empty file": (cut("model_state.tp00_pp01.pdparams", 0), r"is cut off or no .pdparams"),
    "both layouts": (both_layouts, r"holds safetensors or \S+ and model_state\*\.pdparams"),
    "a foreign name": (foreign_name, r"rank3.pdparams is not named as PaddleNLP names"),
    "no config": (without("config.json"), r"has no config.json"),
    "quantized": (
        set_config(quantization_config={"quant_method": "gptq"}),
        r"quantiz|gptq",
    ),
    "old rotary scaling": (
        set_config(rope_scaling_type="ntk"),
        r"rope_scaling_type='ntk' makes .* write it as Hugging Face's rope_scaling",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints(ranks, case):
    damage, message = DAMAGE[case]
    damage(ranks)
    with pytest.raises(UserError, match=message):
        open_checkpoint(ranks)


@pytest.mark.parametrize(
    "layout, message",
    [
        (
            RankLayout(3),
            r"tensor_parallel_degree=3 does not divide the model's num_key_value_heads=4; use 2 or",
        ),
        (RankLayout(8), r"tensor_parallel_degree=8 .* num_key_value_heads=4; use 4$"),
        (RankLayout(1, 5), r"pipeline_parallel_degree=5 exceeds .*num_hidden_layers=4; use 4 or"),
    ],
)
def test_degrees_that_do_not_fit(checkpoints, tmp_path, layout, message):
    source = open_checkpoint(checkpoints / "hf")
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "new", layout=layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("layout", ["hf", "ranks"])
def test_numbers_that_are_none(checkpoints, tmp_path, layout, value, dtype):
    """Whether the result is checked or not, and whether a tensor is copied or cast."""
    source = shutil.copytree(checkpoints / layout, tmp_path / "source")
    tensor = open_checkpoint(source).tensors["model.layers.2.mlp.up_proj.weight"]
    stored = tensor.arrays[-1]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + 4)
        file.write(np.float32(value).tobytes())
    target = RankLayout(2) if layout == "hf" else None
    with pytest.raises(UserError, match=r"up_proj.weight holds 1 numbers that are nan or inf"):
        convert(open_checkpoint(source), tmp_path / "new", layout=target, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Which two forms of a model may lie in one directory: that which is read, or None where it would be
# chance. Meta's and GGUF files often are a publisher's second form of the safetensors.
PAIRS = {
    ("hf", "meta"): "1 safetensors file",
    ("hf", "gguf"): "1 safetensors file",
    ("hf", "ranks"): None,
    ("hf", "megatron"): None,
    ("ranks", "meta"): None,
    ("ranks", "megatron"): None,
    ("meta", "megatron"): None,
    ("gguf", "meta"): None,
    ("gguf", "megatron"): None,
}


@pytest.fixture(scope="module")
def forms(checkpoints, tmp_path_factory):
    """One model in every form."""
    root, tokens = tmp_path_factory.mktemp("forms"), "__internal_testing__/tiny-random-llama"
    config = CONFIG.replace(vocab_size=load_tokenizer(tokens).vocab_size)
    write_model(root / "hf", config)
    for name, form in (
        ("ranks", RankLayout(2, 1)),
        ("meta", MetaForm(1)),
        ("megatron", MegatronForm(1, 1)),
        ("gguf", GGUFForm(load_tokenizer(tokens), "small")),
    ):
        convert(open_checkpoint(root / "hf"), root / name, layout=form)
    return root


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_two_forms_in_one_directory(forms, tmp_path, pair):
    for name in pair:
        kept = shutil.ignore_patterns("config.json" if "gguf" in pair and "hf" not in pair else "")
        shutil.copytree(forms / name, tmp_path / "both", dirs_exist_ok=True, ignore=kept)
    if PAIRS[pair] is not None:
        assert open_checkpoint(tmp_path / "both").describe() == PAIRS[pair]
        return
    for opened in (open_checkpoint, find_tensors):
        with pytest.raises(UserError, match=r"both holds .* and .* may not be the same model"):
            opened(tmp_path / "both")


def test_links_are_followed_to_where_the_result_goes(checkpoints, tmp_path):
    """The result would have been made whole, and then not got the link's name."""
    (tmp_path / "empty").mkdir()
    for name, target in (("new", "absent"), ("there", "empty")):
        (tmp_path / name).symlink_to(target)
        convert(open_checkpoint(checkpoints / "hf"), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert read_tensors(tmp_path / target) == read_tensors(checkpoints / "hf")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        convert(open_checkpoint(checkpoints / "hf"), tmp_path / "one")


def test_targets_that_exist(checkpoints, tmp_path):
    source = open_checkpoint(checkpoints / "hf")
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new directory"):
        convert(source, tmp_path)
    with pytest.raises(UserError, match="is not empty; give a new directory"):
        convert(source, tmp_path / "kept")
    with pytest.raises(UserError, match="is inside the checkpoint"):
        convert(source, checkpoints / "hf" / "new")
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_full_disk(checkpoints, tmp_path, monkeypatch):
    source = open_checkpoint(checkpoints / "hf")
    full = SimpleNamespace(free=1)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match=r"is going to have 0\.0 GB, the disk has room for 0\.0"):
        convert(source, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_midway(checkpoints, tmp_path, monkeypatch):
    from llm.llama.files import copying

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying, "_run", fail)
    with pytest.raises(UserError, match=r"cannot write .*new: No space left on device"):
        convert(open_checkpoint(checkpoints / "hf"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_nothing(checkpoints, tmp_path):
    def check(directory):
        assert (directory / "model.safetensors").is_file()
        raise UserError("differs")

    with pytest.raises(UserError, match="differs"):
        convert(open_checkpoint(checkpoints / "hf"), tmp_path / "new", check=check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        ("--output_dir x", "--input_dir is needed"),
        ("--input_dir x", "--output_dir is needed"),
        (
            "--input_dir x --output_dir y --output_format hf --tensor_parallel_degree 2",
            "complete tensors",
        ),
        ("--input_dir x --output_dir y --check_only --dtype float16", "beside check_only"),
        ("--input_dir x --output_dir y --dtype int8", "not one of float32"),
        ("--input_dir x --output_dir y --tensor_parallel_degree 0", "minimum is 1"),
    ],
)
def test_flags(words, message):
    with pytest.raises(UserError, match=message):
        load((ConvertArguments,), words.split(), prog="convert_checkpoint.py")
