"""Small networks and adapters for the tests about adapters."""

import numpy as np
import paddle

from llm.llama.adapters.lora import LoRAConfig, LoRALinear, add_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix
from llm.llama.build import build_model
from llm.llama.config import PRESETS

TINY = PRESETS["tiny-random-llama"].replace(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base(config=TINY, seed=3, **options):
    """Return a network whose logits differ clearly between tokens."""
    model = build_model(config, seed=seed, **options)
    model.eval()
    return model


def draw_ids(*shape, seed=0):
    return paddle.to_tensor(np.random.default_rng(seed).integers(0, TINY.vocab_size, shape))


def logits(model, *inputs):
    with paddle.no_grad():
        return model(*inputs).numpy()


def with_lora(model=None, config=None, seed=1):
    """Return a network whose adapter has learned something: B is not zero."""
    model = add_lora(model or base(), config or LoRAConfig(r=4), seed=seed)
    rng = np.random.default_rng(seed)
    for layer in model.sublayers():
        if isinstance(layer, LoRALinear):
            value = rng.standard_normal(layer.lora_B.shape, dtype=np.float32)
            layer.lora_B.set_value(0.1 * value)
    return model


def with_prefix(length, projection=False, model=None, seed=1):
    config = PrefixConfig(length, projection, encoder_hidden_size=12 if projection else None)
    return add_prefix(model or base(), config, seed=seed)


def gradients(model, *inputs):
    """Return the gradient of one number that depends on all logits, by parameter."""
    model.train()
    out = model(*inputs)
    weights = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    (out * paddle.to_tensor(weights)).sum().backward()
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    model.eval()
    return found
