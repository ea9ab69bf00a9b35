"""Every path of tests/device/paths.py on the rehearsal device, and the table that shows them."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.llama.config import PRESETS
from tests.device.conftest import DEVICES, TINY, words_of
from tests.device.paths import (
    HALF,
    LAYOUTS,
    OPENED,
    QUICK,
    RESUMED,
    ROLES,
    TRAINING,
    states,
)
from tests.device.rehearse import executor, make_model, rehearse
from tests.device.shrink import RANKS, cuts, head_size, rehearsals, shape_of
from tests.device.test_layouts import LAYOUTS as TWO_RANKS
from tests.distributed.rank_server import free_port

REPO = Path(__file__).resolve().parents[2]
JOBS = "tests.device.jobs_device"
RECIPES = sorted((REPO / "configs").glob("*_gpu*.yaml")) + sorted(
    (REPO / "configs").glob("pretrain_*_*[0-9]gpu.yaml")
)
RECIPES = sorted(set(RECIPES))
long = pytest.mark.long
roles = pytest.mark.parametrize("role", ROLES)


def cells():
    """Yield each way to train in each role; what `make test` leaves out is marked."""
    for name in TRAINING:
        for role in ROLES:
            marks = () if (name, role) in QUICK else long
            yield pytest.param(name, role, marks=marks, id=f"{name}-{role}")


@pytest.fixture(scope="module")
def on_cpu(pretrain, finetune):
    """What a CPU gives in float32 for a way to train; computed once."""
    found = {}

    def run(way):
        key = (way.kind, *sorted(way.flags.items()), way.resumed)
        if key not in found:
            longer = {"max_steps": 4} if way.resumed else {}
            train = pretrain if way.kind == "pretrain" else finetune
            found[key] = train(role="itself", device="cpu", **way.flags, **longer)
        return found[key]

    return run


@pytest.mark.parametrize(("name", "role"), cells())
def test_training(pretrain, finetune, on_cpu, name, role):
    way = TRAINING[name]
    train = pretrain if way.kind == "pretrain" else finetune
    flags = way.flags | way.half | (RESUMED if way.resumed else {})
    half, full = train(role=role, **flags), on_cpu(way)
    np.testing.assert_allclose(half["loss"], full["loss"], rtol=0, atol=way.band)
    assert half.rows != full.rows, "computed in float32"
    if way.resumed:
        again = train(role=role, **flags, resume_from_checkpoint=half.output / "checkpoint-2")
        assert again.rows == half.rows[2:]


@long
def test_a_hundred_updates_in_bfloat16_follow_float32(pretrain):
    """The band is stated in docs/devices.md, as are the figures that this prints."""
    flags = {"max_steps": 100, "learning_rate": 0.003, "lr_scheduler_type": "constant"}
    full = np.array(pretrain(role="itself", device="cpu", **flags)["loss"])
    half = np.array(pretrain(**HALF, **flags)["loss"])
    print("step  float32  bfloat16  difference")
    for step in (0, 9, 19, 39, 59, 79, 99):
        print(f"{step + 1:4}  {full[step]:.4f}  {half[step]:.4f}  {half[step] - full[step]:+.4f}")
    assert full[-10:].mean() < full[:10].mean() - 0.1, "nothing was learnt"
    assert np.abs(half - full).max() <= 0.03
    assert abs((half - full).mean()) <= 0.005


@long
@pytest.mark.parametrize("sharding", ["", "stage1", "stage2"])
def test_an_overflow_on_one_rank_is_left_out_by_both(pretrain, sharding):
    """Nobody waits for a rank that skipped its update; the losses go on equal to one rank's."""
    flags = {"fp16": 1, "fp16_opt_level": "O2", "scale_loss": 1024, "max_steps": 4}
    flags |= {"sharding": sharding, "sharding_parallel_degree": 2} if sharding else {}
    calm = pretrain(ranks=2, **flags)
    upset = pretrain(ranks=2, before=f"{JOBS}:overflow_on_one_rank", **flags)
    assert upset["loss"][:2] == calm["loss"][:2]
    assert upset["loss"][2] != calm["loss"][2], "the second update took place"
    assert np.isfinite(upset["loss"]).all()


@long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_of_another_device(pretrain, layout):
    """As a GPU: test_layouts.py. References round more often than FlashAttention."""
    one = pretrain(role="itself", **HALF)
    shares = 2 if layout.startswith("stage") else 1
    flags = HALF | TWO_RANKS[layout] | {"gradient_accumulation_steps": 2 // shares}
    two = pretrain(role="itself", ranks=2, **flags)
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=0, atol=2e-3)
    np.testing.assert_allclose(two["grad_norm"], one["grad_norm"], rtol=1e-2, atol=0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) for text in ("A", "The quick brown fox")]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def ask(training_device, prompts, tmp_path):
    """``ask(role, script, **flags)``: greedy answers to the prompts."""

    def run(role, script, **flags):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        usual = {"data_file": prompts, "max_length": 6, "device": DEVICES[role]}
        training_device.script(role, script, words_of(usual | {"output_file": out} | flags))
        return [json.loads(line)["output"] for line in out.read_text("utf-8").splitlines()]

    return run


@long
@roles
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predicting(ask, role, dtype):
    assert len(ask(role, "predict_generation", model_name_or_path=TINY, dtype=dtype)) == 2


@long
@roles
@pytest.mark.parametrize("kind", ["W8", "W4"])
def test_integer_weights(device, ask, tmp_path, prompts, role, kind):
    """Quantized on the device, answered there as on a CPU."""
    model = tmp_path / "quantized"
    flags = {"model_name_or_path": TINY, "output_dir": model, "quant_type": kind, "method": "rtn"}
    flags |= {"device": DEVICES[role]} | ({"group_size": 16} if kind == "W4" else {})
    device.script(role, "quantize_generation", words_of(flags))
    on_device = ask(role, "predict_generation", model_name_or_path=model)
    cpu = {"device": "cpu", "ops": "reference"}
    assert on_device == ask("itself", "predict_generation", model_name_or_path=model, **cpu)
    assert len(ask(role, "predict_generation", model_name_or_path=model, dtype="bfloat16")) == 2


@long
@roles
def test_evaluation(device, tmp_path, role):
    """Perplexity in float32 is a CPU's; in bfloat16 it is near."""
    text, found = tmp_path / "text.txt", {}
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    for name, dtype in ((DEVICES[role], "float32"), (DEVICES[role], "bfloat16"), ("cpu", None)):
        out = tmp_path / f"{name}-{dtype}.json"
        flags = {"model_name_or_path": TINY, "device": name, "task": "perplexity"}
        flags |= {"data_file": text, "output_file": out} | ({"dtype": dtype} if dtype else {})
        device.script(role if name != "cpu" else "itself", "evaluate_generation", words_of(flags))
        (result,) = json.loads(out.read_text("utf-8"))["results"]
        found[dtype] = result["figures"]["token_perplexity"]
    assert found["float32"] == pytest.approx(found[None], rel=1e-5)
    assert found["bfloat16"] == pytest.approx(found[None], rel=1e-2)
    assert found["bfloat16"] != found["float32"]


@long
@roles
def test_answers_are_evaluated(device, ask, tmp_path, prompts, role):
    """What a CPU answers counts as right: float32 gets all of it, bfloat16 is scored."""
    cpu = {"device": "cpu", "ops": "reference"}
    right = ask("itself", "predict_generation", model_name_or_path=TINY, **cpu)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text("utf-8").splitlines()]
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps({"src": src, "tgt": tgt}) for src, tgt in zip(asked, right, strict=True)]
    questions.write_text("\n".join(lines), encoding="utf-8")
    flags = {"model_name_or_path": TINY, "device": DEVICES[role], "task": "squad"}
    flags |= {"data_file": questions, "chat_template": "plain", "max_answer_tokens": 6}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        words = words_of(flags | {"dtype": dtype, "output_file": out})
        device.script(role, "evaluate_generation", words)
        (result,) = json.loads(out.read_text("utf-8"))["results"]
        assert result["figures"]["total"] == len(asked) > 0
        assert result["figures"]["exact_match"] == 100 or dtype == "bfloat16"


@long
@roles
def test_export_and_inference(device, ask, tmp_path, role):
    flags = {"model_name_or_path": TINY, "device": DEVICES[role], "output_path": tmp_path / "llama"}
    device.script(role, "export_generation_model", words_of(flags | {"check": 0}))
    answers = ask(role, "infer_generation", model_dir=tmp_path)
    cpu = {"device": "cpu", "ops": "reference"}
    assert answers == ask("itself", "predict_generation", model_name_or_path=TINY, **cpu)


@long
@roles
def test_serving(device, tmp_path, role):
    words = words_of({"model_name_or_path": TINY, "device": DEVICES[role]})
    request, file = {"inputs": "A", "parameters": {"max_new_tokens": 4}}, tmp_path / "answer"
    device.call(role, f"{JOBS}:served", role, words, free_port(), request, str(file))
    assert json.loads(file.read_text("utf-8"))["generated_text"]


def recipes():
    """Yield every run of every recipe for GPUs; one on one device is quick."""
    for recipe in RECIPES:
        for run in rehearsals(recipe):
            marks = () if run.name == "pretrain_llama3.2_1b_continue_gpu" else long
            yield pytest.param(run, id=f"{run.name}-{run.layout.replace(' ', '')}", marks=marks)


@pytest.mark.parametrize("run", recipes())
def test_recipes(training_device, tmp_path, run):
    make_model(training_device, run, tmp_path / "model")
    for line in rehearse(run, tmp_path / "model", tmp_path, executor(training_device, 250)):
        print(line)


@long
@pytest.mark.timeout(1800)
def test_gpu_first(device, tmp_path):
    """`make gpu-first`, but for layouts: Paddle's launcher knows no GPUs here."""
    words = ["--small", "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "tests.device.run", "--role", "gpu", "--"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.gpu_first", *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-random-llama" in done.stdout and "FAILED" not in done.stdout


def test_every_recipe_for_gpus_is_rehearsed():
    for recipe in (REPO / "configs").glob("*.yaml"):
        assert (recipe in RECIPES) == ("device: gpu" in recipe.read_text("utf-8")), recipe.name


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"t": 4, "p": 2}, [{"t": 2, "p": 2}]),
        ({"t": 8}, [{"t": 4}]),
        ({"t": 6}, [{"t": 2}]),
        ({"t": 4, "p": 8, "s": 2}, [{"t": 2, "p": 2}, {"t": 2, "s": 2}, {"p": 2, "s": 2}]),
    ],
)
def test_degrees_that_are_left(degrees, expected):
    found = cuts(degrees)
    assert found == expected
    assert all(np.prod(list(cut.values())) <= RANKS for cut in found)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_shrunken_network_is_of_the_same_make(name, tensor):
    whole = PRESETS[name]
    small = shape_of(whole, tensor, 2)
    ratio = whole.num_attention_heads // whole.num_key_value_heads
    assert small.num_attention_heads == ratio * small.num_key_value_heads
    assert small.num_key_value_heads % tensor == small.intermediate_size % tensor == 0
    size = whole.head_dim or whole.hidden_size // whole.num_attention_heads
    assert (size % 8 == 0) == (small.head_dim % 8 == 0) and head_size(size) == small.head_dim
    assert small.rope_scaling == whole.rope_scaling
    assert small.tie_word_embeddings == whole.tie_word_embeddings


def table():
    """Return the rows of docs/devices.md's table of paths."""
    text = (REPO / "docs" / "devices.md").read_text(encoding="utf-8")
    section = text.partition("## What was shown, by path and device\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section, flags=re.M)
    return {name: (cpu, gpu, other) for name, cpu, gpu, other in rows[1:]}


def test_the_table_of_paths_says_what_the_tests_show():
    assert table() == states()


def test_what_is_called_rehearsed_has_a_test():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name.partition("[")[0] for name in OPENED.values()} <= own
    assert set(LAYOUTS) == set(TWO_RANKS)
    assert {name for name, _ in QUICK} <= set(TRAINING)
