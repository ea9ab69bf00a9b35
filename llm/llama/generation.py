"""Generation with the network itself: the runner behind ``predict_generation.py``.

Sampling and the prefill/decode loop are the engine's (``llm.engine``); this is only the step that
an exported program would otherwise do.
"""

from typing import Any

import numpy as np
import paddle

from llm.llama.cache import DEFAULT_BLOCK_SIZE, new_caches
from llm.llama.modeling import LlamaForCausalLM


class DygraphRunner:
    """Implements ``llm.engine.runner.Runner`` with a network in dygraph.

    Args:
        model: the network; switched to evaluation.
        block_size: tokens per cache block.
        max_model_len: longest prompt plus answer; the trained context when not given. Dynamic
            rotary scaling assumes this length throughout.
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
        self.block_size = block_size
        self.max_model_len = max_model_len or model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.eos_ids = model.config.eos_token_id
        self._caches: list[Any] = []

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""
        dtype = str(self.model.model.embed_tokens.weight.dtype).rsplit(".", 1)[-1]
        self._caches = new_caches(self.model.config, num_blocks, self.block_size, dtype)

    def run(self, *inputs: np.ndarray) -> np.ndarray:
        """Return float32 logits ``[n, V]``; inputs are those of ``Runner.run``."""
        tensors = [paddle.to_tensor(array) for array in inputs]
        with paddle.no_grad():
            logits = self.model.forward_paged(*tensors, self._caches, self.max_model_len)
        return logits.numpy()
