"""The table of quantization: its references, and that documents quote what it has stored."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))
import quant_gguf
import quant_zero_points

from llm.llama.quantization.gptq import Curvature


def test_zero_points_equal_optimal_brain_quantization():
    """Input by input with the inverse computed anew each time, in float64, on grids as they are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal([400, 32]) @ rng.standard_normal([32, 32])
    hessian, weight = x.T @ x / 400, rng.standard_normal([32, 6]).astype(np.float32) + 0.5
    curvature = Curvature.of(hessian.copy())
    scale, zero = quant_zero_points.search(weight, curvature.diagonal_I, 2)
    order, diagonal = curvature.order_I, np.diag(hessian)
    damped = hessian[np.ix_(order, order)] + 0.01 * diagonal.mean() * np.eye(32)
    left, wanted = weight[order].astype(np.float64), np.zeros([32, 6])
    for place, which in enumerate(order):
        inverse = np.linalg.inv(damped[place:, place:])
        step, point = scale[which // 16], zero[which // 16]
        wanted[which] = (np.clip(np.rint(left[place] / step) + point, 0, 15) - point) * step
        lost = left[place] - wanted[which]
        left[place:] -= np.outer(inverse[:, 0] / inverse[0, 0], lost)
    np.testing.assert_allclose(quant_zero_points.rounded(weight, curvature, 2), wanted, rtol=1e-5)


def test_types_of_llama_cpp():
    """Of 30 layers, 3 + 4 at the ends and every third between take finer types in two places."""
    kinds = Counter(
        quant_gguf.type_of(f"model.layers.{layer}.{name}.weight", width, "Q4_K_M", 30, True)
        for layer in range(30)
        for name, width in (("self_attn.v_proj", 576), ("mlp.down_proj", 1536))
    )
    assert kinds == {"Q5_0": 16, "Q8_0": 14, "Q4_K": 16, "Q6_K": 14}
    head = "model.embed_tokens.weight"
    assert quant_gguf.type_of(head, 576, "Q4_0", 30, True) == "Q8_0"
    assert quant_gguf.type_of(head, 512, "Q4_0", 30, True) == "Q6_K"
    assert quant_gguf.type_of(head, 512, "Q4_0", 30, False) == "Q4_0"


def test_the_guide_quotes_stored_rows():
    """The table of a trained model is what the command printed and kept, all of one text."""
    guide = (REPO / "docs" / "quantization.md").read_text(encoding="utf-8")
    section = guide.partition("### A trained model")[2].partition("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ][1:]
    results = (REPO / "benchmarks" / "results" / "quantization.jsonl").read_text(encoding="utf-8")
    stored = [row for row in map(json.loads, results.splitlines()) if "change" in row]
    printed = {
        (
            row["form"],
            f"{row['linear_bytes'] / 1e6:.1f}" if row["linear_bytes"] else "",
            f"{row['perplexity']:.3f}",
            f"{row['change']:+.2f} %",
            ", ".join(f"{count} {kind}" for kind, count in row.get("types", {}).items()),
        ): row
        for row in stored
    }
    assert len(table) > 5
    rows = [printed[(form, *figures)] for form, _, *figures in table]
    for row, (_, samples, *_) in zip(rows, table, strict=True):
        assert samples in ("", str(row["samples"]))
    for key in ("text_sha256", "calibration_sha256"):
        (digest,) = {row[key] for row in rows}
        assert digest[:12] in section
