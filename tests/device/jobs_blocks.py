"""Generation through Paddle's kernels for blocks on the rehearsal device, beside whole rows."""

import dataclasses
from typing import Any

import numpy as np
import paddle

from external_ops import block_decoder
from external_ops.backend import select_ops
from llm.engine.batch import Batch
from llm.engine.processes import Team, share
from llm.engine.runners import DygraphRunner
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import LlamaConfig
from llm.llama.fused import pack, why_not
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from llm.parallel.layout import Layout
from llm.parallel.topology import start

SHAPE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
# Sequences of a step with how many of their tokens it runs.
STEPS = {
    "two prompts": [("a", 40), ("b", 9)],
    "single tokens beside a prompt": [("a", 1), ("b", 1), ("c", 30)],
    "the later part of a prompt beside single tokens": [("a", 1), ("c", 25), ("b", 1)],
    "only the later part of a prompt": [("c", 15)],
    "single tokens": [("a", 1), ("b", 1), ("c", 1)],
    "tokens that see more than shared memory holds": [("a", 1), ("b", 1), ("c", 1)],
    "single tokens again": [("a", 1), ("b", 1), ("c", 1)],
}
LENGTHS = {"a": 46, "b": 15, "c": 74}


def network(dtype: str, **shape: Any) -> LlamaForCausalLM:
    """Return a network whose weights bfloat16 can hold."""
    config = LlamaConfig.from_hf(SHAPE | shape, "tests")
    model = build_model(config, seed=0, dtype="float32")
    for parameter in model.parameters():
        parameter.set_value(parameter.astype("bfloat16").astype("float32"))
    if dtype == "float32":
        return model
    half = build_model(config, seed=0, dtype=dtype)
    for to, one in zip(half.parameters(), model.parameters(), strict=True):
        to.set_value(one.astype(dtype))
    return half


def run_steps(model: LlamaForCausalLM, runner: DygraphRunner) -> dict[str, list[Any]]:
    """Run :data:`STEPS`; return by step the logits of all its tokens, and where each belongs."""
    random = np.random.default_rng(3)
    tokens = {name: random.integers(0, 256, length) for name, length in LENGTHS.items()}
    width = -(-max(LENGTHS.values()) // runner.block_size)
    runner.allocate(width * len(LENGTHS))
    order = np.random.default_rng(4).permutation(width * len(LENGTHS)).reshape(-1, width)
    done, seen = dict.fromkeys(LENGTHS, 0), {}
    real = block_decoder.longest_single
    for name, plan in STEPS.items():
        ids, sequences, positions, table, where = [], [], [], [], []
        for number, (key, count) in enumerate(plan):
            places = np.arange(done[key], done[key] + count)
            done[key] += count
            ids.append(tokens[key][places])
            sequences.append(np.full(count, number))
            positions.append(places)
            table.append(order["abc".index(key)])
            where += [(key, int(place)) for place in places]
        places = np.concatenate(positions).astype(np.int32)
        used = places.max() // runner.block_size + 1
        batch = Batch(
            np.concatenate(ids).astype(np.int64),
            np.concatenate(sequences).astype(np.int32),
            places,
            np.ascontiguousarray(np.array(table, np.int32)[:, :used]),
            np.arange(len(where)),
        )
        if "shared memory" in name:
            block_decoder.longest_single = lambda *_: 12
        seen[name] = [runner.run(batch).tolist(), where]
        block_decoder.longest_single = real
    whole = {
        key: model(paddle.to_tensor(tokens[key][None, :])).numpy()[0].tolist() for key in LENGTHS
    }
    return {"whole": whole, **seen}


def steps(dtype: str, shape: dict[str, Any], block: int | None, prefix: int) -> dict[str, Any]:
    """Run the steps in half precision, and whole rows in float32."""
    wide, half = network("float32", **shape), network(dtype, **shape)
    if prefix:
        paddle.seed(1)
        for model in (wide, half):
            add_prefix(model, PrefixConfig(prefix))
        for to, one in zip(half.parameters(), wide.parameters(), strict=True):
            to.set_value(one.astype(to.dtype))
    wide.eval()
    pack(half)
    with paddle.no_grad():
        found = run_steps(wide, DygraphRunner(half, block_size=block))
        found["rows"] = half(paddle.arange(20).unsqueeze(0)).numpy().tolist()
        found["rows expected"] = wide(paddle.arange(20).unsqueeze(0)).numpy().tolist()
    return found


def quantized(kind: str, group: int | None, dtype: str) -> dict[str, Any]:
    """Run the steps with integer weights in half precision, and whole rows with them widened."""
    wide = network("float32")
    quantize_model(wide, QuantConfig.of_type(kind, group))
    half = network(dtype)
    quantize_model(half, QuantConfig.of_type(kind, group))
    wide.eval()
    pack(half)
    with paddle.no_grad():
        found = run_steps(wide, DygraphRunner(half))
    found["linear"] = type(half.model.layers[0].qkv).__name__
    return found


def shared(ranks: int) -> dict[str, Any] | None:
    """Run the steps with a network that ranks split, of which the first leads."""
    topology = start(Layout(tensor=ranks), "gpu")
    team = Team(topology)
    wide = network("float32")
    wide.eval()
    with team.opening(), paddle.no_grad():
        split = build_model(wide.config, seed=0, dtype="bfloat16", topology=topology)
        pack(split)
        runner = share(team, split)
        found = None if runner is None else run_steps(wide, runner)
    team.close()
    return found


def reasons() -> list[str]:
    """Say why networks are not packed."""
    half = network("bfloat16")
    reference = dataclasses.replace(half.ops, decoder=None, choices=())
    found = [why_not(half, traced=True), why_not(network("float32"))]
    found.append(why_not(network("bfloat16", num_attention_heads=8, hidden_size=64)))
    half.ops = reference
    forms = {choice.op: choice.form for choice in select_ops(device="gpu").choices}
    return [str(one) for one in [*found, why_not(half), forms["decoder"]]]
