"""The script: converts, compares afresh, and finds errors that were planted."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.e2e import training_process
from tests.unit.llama.files.models import SHAPES, write_model

CONFIG = SHAPES["llama-2-gqa"]


def run(repo, *words, status=0, ranks=None):
    """Run the script, as a fork of the rank server where one is given."""
    command = [sys.executable, "convert_checkpoint.py", *words, "--threads", "1"]
    return training_process.run([str(word) for word in command], repo, status, ranks)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("convert") / "hf", CONFIG)


def test_convert_and_check(repo, ranks, source, tmp_path):
    done = run(
        *(repo, "--input_dir", source, "--output_dir", tmp_path / "ranks"),
        *("--tensor_parallel_degree", 2, "--pipeline_parallel_degree", 2),
        *("--dtype", "bfloat16", "--check"),
    )
    places = ["embedding", *(f"layer {n}" for n in range(4)), "logits"]
    figures = r"\d\.\de[+-]\d\d"
    line = rf"^(\w+(?: \d)?) +{figures} BF16 costs {figures}, of 0\.05 at most$"
    assert re.findall(line, done.stdout, re.M) == places
    assert f"wrote {tmp_path / 'ranks'} from 1 safetensors file" in done.stderr
    words = ("--input_dir", tmp_path / "ranks", "--output_dir", tmp_path / "back")
    done = run(repo, *words, ranks=ranks)
    assert "PaddleNLP's files of 2 tensor parallel x 2 pipeline ranks" in done.stderr


def test_a_failed_check_leaves_no_directory(repo, source, tmp_path, monkeypatch):
    """Convert with a wrong table of fused heads in the writer: the check is another process."""
    code = (
        "import runpy, sys\n"
        "from llm.llama.files import rank_layout\n"
        "right = rank_layout._interleaved\n"
        "rank_layout._interleaved = lambda config, parts: list(right(config, parts))[::-1]\n"
        "sys.argv[0] = 'convert_checkpoint.py'\n"
        "runpy.run_path('convert_checkpoint.py', run_name='__main__')\n"
    )
    words = ["--input_dir", source, "--output_dir", tmp_path / "new"]
    words += ["--fuse_attention_qkv", "--check", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "layer 0 is off by" in done.stderr and "3 more places differ" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_lost_is_said(repo, ranks, source, tmp_path):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    words = ("--input_dir", tmp_path / "hf", "--output_dir")
    said = run(repo, *words, tmp_path / "meta", "--output_format", "meta", ranks=ranks).stderr
    assert (
        f"meta holds no tokenizer: meta has a form of its own for one; keep that of {tmp_path}"
        in said
    )
    said = run(repo, *words, tmp_path / "hf2", ranks=ranks).stderr
    assert "no tokenizer" not in said


def test_models_of_other_shapes_are_not_compared(repo, ranks, source, tmp_path):
    other = write_model(tmp_path / "other", SHAPES["llama-3.1"])
    words = ("--check_only", "--input_dir", source, "--output_dir", other)
    said = run(repo, *words, status=2, ranks=ranks).stderr
    assert "max_position_embeddings is 4096 in" in said and "not the same model" in said
