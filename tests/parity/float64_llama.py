"""A Llama in NumPy and float64, written from the papers: the yardstick of both fp32 sides."""

import numpy as np

from llm.llama.modeling import LlamaForCausalLM

Arrays = dict[str, np.ndarray]


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _linear(weights: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)


def _attention(
    weights: Arrays, name: str, x: np.ndarray, rotation: np.ndarray, size: int
) -> np.ndarray:
    batch, length, _ = x.shape
    q, k, v = (
        _linear(weights, f"{name}.{part}_proj", x).reshape(batch, length, -1, size)
        for part in "qkv"
    )
    q, k = ((y[..., : size // 2] + 1j * y[..., size // 2 :]) * rotation[:, :, None] for y in (q, k))
    mixed = []
    for head in range(q.shape[2]):
        shared = head * k.shape[2] // q.shape[2]
        scores = (q[:, :, head] @ k[:, :, shared].conj().transpose(0, 2, 1)).real / np.sqrt(size)
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, :, shared])
    return _linear(weights, f"{name}.o_proj", np.concatenate(mixed, axis=-1))


def float64_logits(
    model: LlamaForCausalLM,
    ids: np.ndarray,
    positions: np.ndarray,
    frequencies: np.ndarray,
    scale: float = 1.0,
) -> np.ndarray:
    """Return logits ``[B, S, V]``; angles are rounded to float32, as both sides define them.

    ``scale`` is what cosines and sines are multiplied by.
    """
    config = model.config
    weights = {n: p.numpy().astype(np.float64) for n, p in model.named_parameters()}
    angles = positions[..., None].astype(np.float32) * frequencies
    rotation = scale * np.exp(1j * angles.astype(np.float64))
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        y = _norm(x, weights[f"{layer}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + _attention(weights, f"{layer}.self_attn", y, rotation, config.head_dim)
        y = _norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = _linear(weights, f"{layer}.mlp.gate_proj", y)
        gated = gate / (1 + np.exp(-gate)) * _linear(weights, f"{layer}.mlp.up_proj", y)
        x = x + _linear(weights, f"{layer}.mlp.down_proj", gated)
    x = _norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    embedding = weights["model.embed_tokens.weight"]
    return x @ weights.get("lm_head.weight", embedding.T)
