"""A decoder layer whose linears of one input are one linear, op by op; for inference.

E hidden, D head dimension.
"""

from paddle import Tensor, nn

from llm.llama.layers import SAME_INPUT, is_plain
from llm.llama.modeling import LlamaDecoderLayer, RMSNorm
from llm.llama.seams import Attend


def joined(layer: LlamaDecoderLayer) -> tuple[tuple[nn.Layer, ...], ...]:
    """Return a layer's linears, those together that become one."""
    held = dict(layer.named_sublayers())
    return tuple(tuple(held[name] for name in names) for names in SAME_INPUT)


def outputs_of(linear: nn.Layer) -> int:
    """Return the number of a linear's outputs, of this process where it is split."""
    return int(linear.weight.shape[1]) if is_plain(linear) else int(linear.out_features)


class FusedLayer(nn.Layer):
    """Stands in the place of a ``LlamaDecoderLayer``.

    Args:
        layer: the one that it is made from.
        input_layernorm: before attention.
        post_attention_layernorm: before the feed-forward.
        qkv: outputs are the query heads, then those of keys, then those of values.
        o: of the attention's output.
        gate_up: outputs are those of the gate, then those of its factor.
        down: of the feed-forward's output.
    """

    def __init__(
        self,
        layer: LlamaDecoderLayer,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
        qkv: nn.Layer,
        o: nn.Layer,
        gate_up: nn.Layer,
        down: nn.Layer,
    ) -> None:
        super().__init__()
        attention = layer.self_attn
        self.head_dim, self.index = attention.head_dim, attention.index
        self.heads = outputs_of(attention.q_proj) // self.head_dim
        self.rotary, self.swiglu = attention.rotary, layer.mlp.swiglu
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *prefix: Tensor
    ) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``, op by op."""
        qkv = self.qkv(self.input_layernorm(x))
        qkv = qkv.reshape([0] * (x.ndim - 1) + [-1, self.head_dim])
        groups = (qkv.shape[-2] - self.heads) // 2
        q, k, v = qkv.split([self.heads, groups, groups], axis=-2)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        x = x + self.o(attend(self.index, q, k, v, *prefix).flatten(-2))
        gate, up = self.gate_up(self.post_attention_layernorm(x)).chunk(2, axis=-1)
        return x + self.down(self.swiglu(gate, up))
