"""quantize_generation.py, and the scripts that take what it writes."""

import json
import sys

import pytest

from tests.e2e import training_process

TINY = "__internal_testing__/tiny-random-llama"


@pytest.fixture(scope="module")
def made(repo, ranks, tmp_path_factory):
    """Quantize the built-in model; return a runner of scripts and the directory."""
    root = tmp_path_factory.mktemp("quantize")
    text = (repo / "README.md").read_text(encoding="utf-8")[:12_000]
    (root / "text.txt").write_text(text, encoding="utf-8")

    def run(*words, status=0, alone=False):
        command = [sys.executable, *words, "--threads", "1"]
        return training_process.run(command, repo, status, None if alone else ranks)

    done = run(
        *("quantize_generation.py", "--model_name_or_path", TINY, "--output_dir", root / "w4"),
        *("--quant_type", "W4", "--group_size", "16", "--calibration_file", root / "text.txt"),
        *("--calibration_samples", "8", "--calibration_length", "64"),
        *("--eval_file", root / "text.txt", "--eval_length", "64"),
        alone=True,
    )
    return run, root, done.stdout


def test_figures_are_printed_and_stored(made):
    _, root, printed = made
    report = json.loads((root / "w4" / "quantization_report.json").read_text())
    figures = report["perplexity"]
    assert f"{figures['before']:.3f}" in printed and f"{figures['after']:.3f}" in printed
    assert figures["before"] != figures["after"]
    assert figures["after"] == pytest.approx(figures["before"], rel=0.03)
    assert report["method"] == "gptq" and report["calibration"]["rows"] == 8
    sizes = report["linear_bytes"]
    # 4 bits, and a float32 scale for each 16 of them.
    assert sizes["after"] == sizes["before"] * (4 + 2) // 32


def test_predict_and_evaluate_take_it(made):
    run, root, _ = made
    model = ("--model_name_or_path", root / "w4")
    out = root / "answers.jsonl"
    asked = ("--prompt", "The sky is", "--max_length", "8", "--output_file", out)
    done = run("predict_generation.py", *model, *asked)
    assert len(json.loads(out.read_text().splitlines()[0])["ids"]) == 8
    scored = root / "scores.json"
    done = run(
        *("evaluate_generation.py", *model, "--task", "perplexity", "--max_length", "64"),
        *("--data_file", root / "text.txt", "--output_file", scored),
    )
    report = json.loads((root / "w4" / "quantization_report.json").read_text())
    assert "token_perplexity" in done.stdout
    (row,) = json.loads(scored.read_text())["results"]
    # Another process, whose sums may be cut another way.
    assert row["figures"]["token_perplexity"] == pytest.approx(
        report["perplexity"]["after"], rel=2e-8
    )


def test_refusals_leave_no_directory(made):
    run, root, _ = made
    for words, message in (
        (("--model_name_or_path", root / "w4"), "quantized already"),
        (("--model_name_or_path", TINY, "--quant_type", "W4"), "needs --calibration_file"),
    ):
        done = run("quantize_generation.py", *words, "--output_dir", root / "none", status=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(p.name for p in root.iterdir() if "none" in p.name) == []
