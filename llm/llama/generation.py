"""Generation with the network itself: the runner behind ``predict_generation.py``.

Sampling and the prefill/decode loop are the engine's (``llm.engine``); this is only the step that
an exported program would otherwise do.
"""

import math
from typing import Any

import numpy as np
import paddle

from llm.errors import UserError
from llm.llama.cache import DEFAULT_BLOCK_SIZE, StepInputs, new_caches
from llm.llama.config import LlamaConfig
from llm.llama.modeling import LlamaForCausalLM


def _divisor_near(size: int, number: int) -> int:
    """Return the divisor of a number that is nearest to a size, by ratio."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / size)))


def _own_heads(model: LlamaForCausalLM) -> LlamaConfig:
    """Return the configuration with the heads that this process holds."""
    config = model.config
    if model.shard is None:
        return config
    ranks = config.vocab_size // model.model.embed_tokens.weight.shape[0]
    return config.replace(
        num_attention_heads=config.num_attention_heads // ranks,
        num_key_value_heads=config.num_key_value_heads // ranks,
    )


class DygraphRunner:
    """Implements ``llm.engine.runner.Runner`` with a network in dygraph.

    A prefix (``llm.llama.prefix``) is computed once, when the cache is allocated, into blocks that
    all sequences share; callers go on counting positions from 0. Where tensor parallel ranks share
    the network, each has a runner, caches its own heads and gets all logits; their callers have to
    run the same steps.

    Args:
        model: the network; switched to evaluation.
        block_size: tokens per cache block; with a prefix, the nearest size that divides it.
        max_model_len: longest prefix plus prompt plus answer; the trained context when not given.
            Dynamic rotary scaling assumes this length throughout.

    Raises:
        UserError: a prefix that fills the context.

    ``max_model_len`` of the runner is what the prefix leaves for prompt and answer.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_model_len: int | None = None,
    ) -> None:
        model.eval()
        self.model = model
        self._context = max_model_len or model.config.max_position_embeddings
        self._prefix = 0 if model.prefix is None else model.prefix.length
        if self._prefix >= self._context:
            raise UserError(
                f"a prefix of {self._prefix} tokens fills the context of {self._context}; use a "
                "shorter one"
            )
        self.block_size = _divisor_near(block_size, self._prefix) if self._prefix else block_size
        self.max_model_len = self._context - self._prefix
        self.vocab_size = model.config.vocab_size
        self.eos_ids = model.config.eos_token_id
        self._caches: list[Any] = []
        self._inputs = StepInputs()
        self._shared = np.zeros([0], np.int32)

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks, and for the prefix's."""
        shared = self._prefix // self.block_size
        self._shared = np.arange(num_blocks, num_blocks + shared, dtype=np.int32)
        dtype = str(self.model.model.embed_tokens.weight.dtype).rsplit(".", 1)[-1]
        config = self.model.config
        parts = 1 if self.model.shard is None else self.model.shard.parts
        self._caches = new_caches(config, num_blocks + shared, self.block_size, dtype, parts)
        if self.model.prefix is None:
            return
        with paddle.no_grad():
            flat = [tensor for layer in self.model.prefix() for tensor in layer]
            for cache, tensor in zip(self._caches, flat, strict=True):
                cache[num_blocks:] = tensor.astype(dtype).reshape([shared, *cache.shape[1:]])

    def run(
        self,
        ids_T: np.ndarray,
        sequence_T: np.ndarray,
        position_T: np.ndarray,
        block_table_NM: np.ndarray,
        rows_n: np.ndarray,
    ) -> np.ndarray:
        """Return float32 logits ``[n, V]``; inputs are those of ``Runner.run``."""
        if self._prefix:
            shared = np.broadcast_to(self._shared, [len(block_table_NM), len(self._shared)])
            block_table_NM = np.concatenate([shared, block_table_NM], axis=1)
            position_T = position_T + np.int32(self._prefix)
        tensors = self._inputs.fill((ids_T, sequence_T, position_T, block_table_NM, rows_n))
        with paddle.no_grad():
            logits = self.model.forward_paged(*tensors, self._caches, self._context)
        return logits.numpy()
