"""Whether an exported program computes what its network computes, asked in a fresh process."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from paddle import Tensor

from common.ending import run_check
from common.errors import UserError
from external_ops import native
from llm.engine.replay import replay, together
from llm.engine.runners import DygraphRunner
from llm.llama.files.packed import read_packed
from llm.llama.files.parameters import missing_weights
from llm.llama.fused_state import tensors_of
from llm.llama.manifest import Manifest, packed_file, program_files
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.linear import QuantizedLinear

# Prompts of a check: one token, less than a block, over several blocks; and what follows each.
_LENGTHS = (1, 7, 40)
_MORE = 16
# Largest difference of a logit, as a share of the largest logit, where two processes may add up in
# different orders. Inputs or a cache that are rounded to 8 bits make steps of last bits.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_ROUNDED = 1e-1


@dataclass(frozen=True)
class Agreement:
    """What a check has found.

    Args:
        positions: of which all logits were compared, alone and in company.
        tolerance: the difference that was allowed, as a share of the largest logit; 0 is none.
        difference: the largest that there was.
    """

    positions: int
    tolerance: float
    difference: float

    def __str__(self) -> str:
        if self.tolerance == 0:
            return f"logits of {self.positions} tokens, alone and together, equal bit by bit"
        return (
            f"logits of {self.positions} tokens, alone and together, differ by at most "
            f"{self.difference:.1e} of the largest; {self.tolerance:.0e} is allowed"
        )


def verify_program(
    model: LlamaForCausalLM, output_path: str | Path, manifest: Manifest, threads: int, device: str
) -> Agreement:
    """Compare the export with its network: the weights, and logits in a fresh process.

    The program runs each sequence alone and all of them together. Where all kernels are native, its
    logits have to be the network's bit by bit; elsewhere they may differ as sums in another order
    do.

    Args:
        model: the network that was exported.
        output_path: where :func:`export_program` wrote.
        manifest: what it returned.
        threads: CPU threads of the other process.
        device: as ``--device`` takes it, where both run.

    Raises:
        UserError: the program disagrees with the network, or did not run.
    """
    output = Path(output_path)
    _check_weights(model, output, manifest)
    sequences, prompts = _sequences(model.config.vocab_size, manifest.max_model_len)
    runner = DygraphRunner(
        model,
        block_size=manifest.block_size,
        max_model_len=manifest.max_model_len,
        cache_dtype=manifest.cache_dtype,
    )
    expected = replay(runner, sequences, together(sequences, prompts))
    request = {"sequences": sequences, "prompts": prompts, "threads": threads, "device": device}
    tolerance = _tolerance(model, device, manifest.cache_dtype)
    largest = 0.0
    for way, logits in _run(output, request).items():
        largest = max(largest, _compare(logits, expected, tolerance, f"{output} ({way})"))
    return Agreement(len(expected), tolerance, largest)


def _sequences(vocab_size: int, max_model_len: int) -> tuple[list[list[int]], list[int]]:
    """Return random tokens, and how many of each sequence are its prompt."""
    room = max(1, max_model_len - _MORE)
    prompts = sorted({min(length, room) for length in _LENGTHS})
    more = min(_MORE, max_model_len - prompts[-1])
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, prompt + more).tolist() for prompt in prompts], prompts


def _check_weights(model: LlamaForCausalLM, output: Path, manifest: Manifest) -> None:
    """Find every weight in the export; no few tokens use all rows of an embedding."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.size}
    missing = []
    if manifest.packed_bytes:
        beside = read_packed(packed_file(output.parent, output.name), manifest.described)
        arrays = {} if beside is None else beside[0]
        held = tensors_of(model)
        weights = {"norm": held.pop("norm")}
        missing = [name for name, one in held.items() if not _is(arrays, name, one)]
    missing += missing_weights(program_files(output.parent, output.name)[1], weights)
    if missing:
        raise UserError(
            f"the exported weights are not the network's: {missing[0]} is not among them "
            f"({len(missing)} in all); do not use {output}"
        )


def _is(arrays: Mapping[str, NDArray[Any]], name: str, tensor: Tensor) -> bool:
    """Say whether an array of that name has a tensor's bytes."""
    return name in arrays and arrays[name].tobytes() == tensor.numpy().tobytes()


def _tolerance(model: LlamaForCausalLM, device: str, cache_dtype: str) -> float:
    """Return the largest difference of a logit that is none."""
    native_forms = {choice.op for choice in model.ops.choices if choice.form == "native"}
    if device == "cpu" and model.seams.fused is not None and "rms_norm" in native_forms:
        return 0.0
    quantized = [one for one in model.sublayers() if isinstance(one, QuantizedLinear)]
    rounds = any(one.config.activation_bits is not None for one in quantized)
    if rounds or cache_dtype == "int8":
        return _ROUNDED
    table = model.model.embed_tokens
    assert table is not None, "stages of a pipeline are not exported"
    return _TOLERANCE[table.type_name]


def _run(output: Path, request: dict[str, object]) -> dict[str, NDArray[np.float32]]:
    """Return the program's logits, by how the sequences were run."""
    place = output.parent.absolute()  # the other process runs in the checkout
    words = ["-m", "llm.engine.replay", str(place), output.name]
    level = {"LLAMA_OPS_LEVEL": native.level()} if native.available() else {}
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "logits.npz"
        result = run_check(
            words,
            level,
            input=json.dumps({**request, "target": str(target)}),
            capture_output=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        if result.returncode:
            status = f"exit status {result.returncode}"
            raise UserError(
                f"the exported program did not run ({status}):\n{result.stderr[-2000:]}"
            )
        with np.load(target) as found:
            return dict(found)


def _compare(
    logits: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float, what: str
) -> float:
    """Return the largest difference, as a share of the largest logit; refuse a larger one."""
    bits, wanted = logits.view(np.int32), expected.view(np.int32)
    other = (bits != wanted) & ~(np.isnan(logits) & np.isnan(expected))
    if not other.any():
        return 0.0
    difference = np.abs(logits.astype(np.float64) - expected)[other].max()
    share = float(difference / np.abs(expected).max())
    if share <= tolerance:
        return share
    position, token = np.argwhere(other)[0]
    raise UserError(
        f"the exported program gives other logits than the network, {other.any(1).sum()} of "
        f"{len(other)} tokens: token {token} scores {logits[position, token]:.6g} instead of "
        f"{expected[position, token]:.6g} behind token {position}; the largest difference is "
        f"{share:.1e} of the largest logit, {tolerance:.0e} is allowed; do not use {what}"
    )
