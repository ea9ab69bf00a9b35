"""Compares a network that ranks split with the same one in each rank's own process."""

from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from external_ops import cross_entropy
from llm.engine.engine import Engine
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.llama.adapters.lora import LoRAConfig, add_lora, load_lora, save_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import LlamaConfig, load_config
from llm.llama.merging import merge_lora
from llm.parallel.layout import Layout
from llm.parallel.tensor import ColumnLinear
from llm.parallel.topology import Topology, start
from llm.train.objectives import next_token_objective

ROWS, LENGTH = 2, 16


def config(**changes: Any) -> LlamaConfig:
    """Return a shape with grouped heads, biases and sizes that four ranks divide."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.2,
    }
    return load_config("tiny-random-llama").replace(**sizes | changes)


def batch(seed: int = 0) -> dict[str, paddle.Tensor]:
    """Return packed rows with labels that do not count."""
    random = np.random.default_rng(seed)
    ids, labels = random.integers(0, 96, [2, ROWS, LENGTH])
    labels[random.random(labels.shape) < 0.3] = -100
    second = np.arange(LENGTH) >= np.array([[5], [9]])
    positions = np.where(second, np.arange(LENGTH) - [[5], [9]], np.arange(LENGTH))
    found = {"input_ids": ids, "labels": labels, "positions": positions}
    found["segments"] = second.astype(np.int64)
    return {name: paddle.to_tensor(value) for name, value in found.items()}


def whole(piece: paddle.Tensor, parameter: paddle.Tensor, topology: Topology) -> np.ndarray:
    """Return the complete gradient or value that the ranks hold pieces of."""
    axis = getattr(parameter, "split_axis", None)
    if getattr(parameter, "sequence_parallel", False):
        piece = piece.clone()
        dist.all_reduce(piece, group=topology.tensor_group)
    if axis is None:
        return piece.numpy()
    pieces: list[paddle.Tensor] = []
    dist.all_gather(pieces, piece.contiguous(), group=topology.tensor_group)
    return np.concatenate([part.numpy() for part in pieces], axis=axis)


def distance(ours: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference as a share of the largest number."""
    assert ours.shape == wanted.shape, (ours.shape, wanted.shape)
    return float(np.abs(ours - wanted).max() / (np.abs(wanted).max() or 1.0))


def lengths_between(model: nn.Layer) -> set[int]:
    """Return the lengths of sequences that the norms of decoder layers see."""
    seen = set()

    def watch(_: nn.Layer, inputs: tuple[paddle.Tensor, ...]) -> None:
        seen.add(inputs[0].shape[1])

    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    hooks = [norm.register_forward_pre_hook(watch) for norm in [*norms, model.model.norm]]
    with paddle.no_grad():
        model(batch()["input_ids"])
    for hook in hooks:
        hook.remove()
    return seen


def exchanges(model: nn.Layer) -> int:
    """Return how many whole inputs decoder layers bring to their column linears."""
    brought = {}

    def watch(layer: nn.Layer, given: tuple[paddle.Tensor, ...], _: paddle.Tensor) -> None:
        whole_input = layer.enter(given[0])
        brought[id(whole_input)] = whole_input  # held, so that no other gets its number

    columns = [part for part in model.model.sublayers() if isinstance(part, ColumnLinear)]
    hooks = [layer.register_forward_post_hook(watch) for layer in columns]
    with paddle.no_grad():
        model(batch()["input_ids"])
    for hook in hooks:
        hook.remove()
    return len(brought)


def losses(model: nn.Layer, given: dict[str, paddle.Tensor]) -> float:
    """Run forward and backward; gradients are left in the parameters."""
    model.clear_gradients()
    total, weight, _ = next_token_objective(model, given)
    (total / weight).backward()
    return total.item() / weight


def compare(one: nn.Layer, split: nn.Layer, topology: Topology) -> dict[str, float]:
    """Return how far values, loss, gradients, logits and figures of a split network are."""
    given = batch()
    for model in (one, split):
        model.train()
    wanted, got = losses(one, given), losses(split, given)
    found = {"loss": abs(got - wanted), "values": 0.0}
    found["gradients"] = gradients(one, split, topology)
    for (name, a), (other, b) in zip(one.named_parameters(), split.named_parameters(), strict=True):
        assert name == other == b.name, (name, other, b.name)
        assert a.stop_gradient == b.stop_gradient, name
        axis = getattr(b, "split_axis", None)
        assert b.is_distributed == (axis is not None), name
        value = whole(b.detach(), b, topology) if axis is not None else b.numpy()
        found["values"] = max(found["values"], distance(value, a.numpy()))
    return found | evaluated(one, split, topology)


def gradients(one: nn.Layer, split: nn.Layer, topology: Topology) -> float:
    """Return the largest difference of the gradients that are in the parameters."""
    errors = {}
    for (name, a), b in zip(one.named_parameters(), split.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            errors[name] = distance(whole(b.grad, b, topology), a.grad.numpy())
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, (worst, errors[worst])
    return errors[worst]


def evaluated(one: nn.Layer, split: nn.Layer, topology: Topology) -> dict[str, float]:
    """Return the differences of logits and their gradients; accuracies have to be equal."""
    given = batch()
    logits = []
    for model in (one, split):
        model.eval()
        model.clear_gradients()
        inputs = [given[name] for name in ("input_ids", "positions", "segments")]
        logits.append(model(*inputs))
        (logits[-1] ** 2).mean().backward()
    found = {"logits": distance(logits[1].numpy(), logits[0].numpy())}
    found["logit gradients"] = gradients(one, split, topology)
    # Some labels that are the likeliest token, which lie on all ranks.
    likeliest = paddle.arange(LENGTH) % 3 == 0
    given["labels"] = paddle.where(likeliest, logits[0].argmax(-1), given["labels"])
    with paddle.no_grad():
        figures = [next_token_objective(model, given)[2]["accuracy"] for model in (one, split)]
    assert figures[0] == figures[1] and figures[0][0] >= 12, figures
    return found


def layouts(ranks: int, sequence: bool) -> Topology:
    """Join the other ranks."""
    return start(Layout(tensor=ranks, sequence_parallel=sequence))


def networks(ranks: int, sequence: bool) -> dict[str, dict[str, float]]:
    """Compare tied and untied networks, with both kernels of the loss, recomputed or not."""
    topology = layouts(ranks, sequence)
    cross_entropy.CHUNK_NUMBERS = 7 * 96  # several chunks, the last one not full
    found = {}
    cases = [(False, False), (True, True)] + ([(False, True), (True, False)] if ranks == 2 else [])
    for tied, fused in cases:
        shape = config(tie_word_embeddings=tied)
        options = {"seed": 3, "use_fused_head_and_loss_fn": fused}
        one = build_model(shape, **options)
        split = build_model(shape, topology=topology, recompute=fused, **options)
        held = sum(p.size for p in split.parameters())
        assert held < sum(p.size for p in one.parameters()) * (1 / ranks + 0.05)
        assert lengths_between(split) == {LENGTH // (ranks if sequence else 1)}
        # One for queries, keys and values, one for gate and up.
        assert exchanges(split) == 2 * shape.num_hidden_layers
        found[f"tied={tied} fused={fused}"] = compare(one, split, topology)
    return found


def pair(topology: Topology, **changes: Any) -> tuple[nn.Layer, nn.Layer]:
    """Return a network and this rank's part of the same one."""
    shape = config(**changes)
    return build_model(shape, seed=3), build_model(shape, seed=3, topology=topology)


def adapters(ranks: int, sequence: bool, directory: str, method: dict[str, Any]) -> dict[str, Any]:
    """Compare LoRA on every linear, trained further from files, with dropout, and merged."""
    topology, found = layouts(ranks, sequence), {}
    one, split = pair(topology)
    targets = r".*_proj|lm_head"
    settings = LoRAConfig(r=3, lora_alpha=8.0, target_modules=targets, **method)
    for model in (one, split):
        add_lora(model, settings, seed=5)
    found["fresh"] = compare(one, split, topology)
    for name, parameter in one.named_parameters():
        if "lora_B" in name:
            paddle.seed(len(name))
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    if topology.rank == 0:
        save_lora(one, directory)
    topology.barrier()
    load_lora(split, directory, trainable=True)
    found["loaded"] = compare(one, split, topology)
    found["dropout"] = dropped(one, split, topology)
    for model in (one, split):
        merge_lora(model)
    return found | {"merged": compare(one, split, topology)}


def dropped(one: nn.Layer, split: nn.Layer, topology: Topology) -> dict[str, float]:
    """Compare losses and gradients where inputs of A are dropped."""
    plain = losses(one.train() or one, batch())
    results = []
    for model in (one, split):
        model.train()
        for layer in model.sublayers():
            if hasattr(layer, "lora_A"):
                layer.dropout = 0.4
        paddle.seed(11)
        results.append(losses(model, batch()))
        model.eval()
    assert abs(results[0] - plain) > 1e-3
    return {"loss": abs(results[1] - results[0]), "gradients": gradients(one, split, topology)}


def prefixes(ranks: int, sequence: bool) -> dict[str, Any]:
    """Compare prefixes, as they are and made by a projection."""
    topology, found = layouts(ranks, sequence), {}
    for projected in (False, True):
        one, split = pair(topology, tie_word_embeddings=projected)
        for model in (one, split):
            add_prefix(model, PrefixConfig(3, prefix_projection=projected), seed=5)
        found[f"projected={projected}"] = compare(one, split, topology)
    return found


def generation(ranks: int) -> list[list[int]]:
    """Return what a split network answers, with a prefix, and what one process answers."""
    topology = layouts(ranks, False)
    answers = []
    for model in pair(topology):
        add_prefix(model, PrefixConfig(4), seed=5)
        engine = Engine(DygraphRunner(model, block_size=4), max_sequences=2, max_step_tokens=8)
        free = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
        answers.append(
            [answer.ids for answer in engine.generate(requests([[1, 2, 3], [7] * 9], free))]
        )
    assert answers[0] == answers[1], answers
    return answers[0]
