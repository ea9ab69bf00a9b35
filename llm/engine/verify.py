"""Whether an exported program says what its network says, asked in a fresh process."""

import json
from pathlib import Path

import numpy as np

from common.ending import run_check
from common.errors import UserError
from llm.engine.engine import Engine
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.llama.manifest import Manifest
from llm.llama.modeling import LlamaForCausalLM

# Prompts of a check: one token, less than a block, over several blocks.
_CHECK_LENGTHS = (1, 7, 40)
_CHECK_NEW_TOKENS = 16


def verify_program(
    model: LlamaForCausalLM, output_path: str | Path, manifest: Manifest, threads: int, device: str
) -> int:
    """Run the export in a fresh process and compare greedy ids, one by one and batched.

    Args:
        model: the network that was exported.
        output_path: where :func:`export_program` wrote.
        manifest: what it returned.
        threads: CPU threads of the other process.
        device: ``cpu`` or ``gpu``, where both run.

    Returns:
        The number of tokens that were compared.

    Raises:
        UserError: the program disagrees with the network, or did not run.
    """
    output = Path(output_path)
    rng = np.random.default_rng(0)
    room = manifest.max_model_len - _CHECK_NEW_TOKENS
    lengths = sorted({max(1, min(length, room)) for length in _CHECK_LENGTHS})
    prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in lengths]
    count = min(_CHECK_NEW_TOKENS, manifest.max_model_len - max(lengths))
    params = SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)
    runner = DygraphRunner(
        model, block_size=manifest.block_size, max_model_len=manifest.max_model_len
    )
    engine = Engine(runner, max_sequences=len(prompts), max_tokens=max(lengths) + count)
    expected = [completion.ids for completion in engine.generate(requests(prompts, params))]
    place = output.parent.absolute()  # the other process runs in the checkout
    words = ["-m", "llm.engine.replay", str(place), output.name]
    request = json.dumps({"prompts": prompts, "count": count, "threads": threads, "device": device})
    root = str(Path(__file__).resolve().parents[2])
    result = run_check(words, input=request, capture_output=True, cwd=root)
    if result.returncode:
        raise UserError(f"the exported program did not run:\n{result.stderr[-2000:]}")
    for kind, got in json.loads(result.stdout).items():
        if got != expected:
            raise UserError(
                f"the exported program gives other tokens than the network ({kind}): {got} "
                f"instead of {expected}; do not use {output}"
            )
    return 2 * count * len(prompts)
