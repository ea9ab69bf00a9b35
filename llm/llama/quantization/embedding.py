"""An embedding of 8-bit integers, which of a tied network is the output matrix too.

V vocabulary, E hidden.
"""

import paddle
from paddle import Tensor, nn

from external_ops.frozen_matmul import widen
from llm.llama.files.slots import Slot
from llm.llama.layers import Embedding
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.files import quantized_slots
from llm.llama.quantization.linear import QuantizedLinear, round_to_nearest

_NAME = "model.embed_tokens"


class QuantizedEmbedding(nn.Layer):
    """An embedding with integer weights, which do not train; gradients reach what is scored.

    Args:
        vocab_size: V.
        hidden_size: E.
        config: of the embedding, with a scale for each token.
        type_name: type of the rows; see ``llm.llama.layers.EmbeddingLike``.

    Attributes:
        linear: the same numbers as the output matrix; its tensors are buffers of this layer.
    """

    plain_weight = None

    def __init__(
        self, vocab_size: int, hidden_size: int, config: QuantConfig, type_name: str
    ) -> None:
        super().__init__()
        linear = QuantizedLinear(hidden_size, vocab_size, config, name=_NAME)
        self._linear = (linear,)  # in a tuple: listed, its tensors would have a second name
        self.config, self.type_name = config, type_name
        self.register_buffer("weight", linear.weight)
        self.register_buffer("weight_scale", linear.weight_scale)

    @property
    def linear(self) -> QuantizedLinear:
        """See the class."""
        return self._linear[0]

    def scores(self, hidden: Tensor) -> Tensor:
        """See ``llm.llama.layers.EmbeddingLike``."""
        out: Tensor = self.linear(hidden)
        return out

    def lookup(self, ids_T: Tensor) -> Tensor:
        """Return ``[T, E]``."""
        rows = [paddle.gather(one, ids_T) for one in (self.weight, self.weight_scale)]
        return widen(*rows).astype(self.type_name)

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``[..., E]``."""
        rows = self.lookup(ids.flatten())
        return rows.reshape([*ids.shape, rows.shape[-1]])

    def widened(self) -> Tensor:
        """Return float32 weights ``[V, E]``."""
        return self.linear.widened()

    def slots(self, name: str) -> dict[str, Slot]:
        """See ``llm.llama.files.slots.StoresItself``."""
        return quantized_slots(name, self.weight, self.weight_scale, self.config)


def install_embedding(model: LlamaForCausalLM, config: QuantConfig) -> None:
    """Put a quantized embedding of zeros into a network, if the description asks for one."""
    embedding = model.model.embed_tokens
    if config.embedding is not None and embedding is not None:
        sizes = model.config.vocab_size, model.config.hidden_size
        made = QuantizedEmbedding(*sizes, config.embedding, embedding.type_name)
        made.linear.matmul = model.ops.frozen_matmul
        model.model.embed_tokens = made


def dequantize_embedding(model: LlamaForCausalLM, dtype: str) -> None:
    """Put a plain embedding with the widened weights in the place of a quantized one, in place."""
    embedding = model.model.embed_tokens
    if isinstance(embedding, QuantizedEmbedding):
        weight = embedding.create_parameter([*embedding.weight.shape], dtype=dtype)
        weight.set_value(embedding.widened().astype(dtype))
        model.model.embed_tokens = Embedding.around(weight)


def quantize_embedding(model: LlamaForCausalLM, config: QuantConfig) -> None:
    """Round the embedding, in place, if the description asks for it.

    Raises:
        UserError: weights that are not finite; the network is unchanged.
    """
    if config.embedding is None:
        return
    values = round_to_nearest(model.model.embed_tokens.plain_weight, config.embedding, _NAME)
    install_embedding(model, config)
    model.model.embed_tokens.linear.fill(*values)
