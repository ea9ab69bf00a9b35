"""Networks whose weights do not train and lie in bfloat16, while everything computes in float32.

What trains beside them (``llm.llama.adapters``) and all activations are float32, on every device;
products with the weights are the op ``frozen_matmul``, which widens them on the way. Norms and
biases, a thousandth of the weights, are float32. Integer weights (``llm.llama.quantization``) may
stand in the place of any linear.

I inputs, O outputs, V vocabulary, E hidden.
"""

from collections.abc import Callable

import paddle
from paddle import Tensor, nn

from llm.llama.layers import Embedding, Linear, name_parameters, replace_layer
from llm.llama.modeling import LlamaForCausalLM, RMSNorm


class FrozenLinear(nn.Layer):
    """Stands in the place of a linear with a bfloat16 weight; maps float32 to float32.

    Args:
        plain: its weight ``[I, O]`` is taken over.
        matmul: the op ``frozen_matmul``.
    """

    def __init__(self, plain: Linear, matmul: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, _wide(self, plain.bias)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.matmul = matmul
        self.training = plain.training

    @property
    def plain_weight(self) -> Tensor | None:
        """See ``llm.llama.layers.LinearLike``."""
        return self.weight

    def widened(self) -> Tensor:
        """Return float32 weights ``[O, I]``."""
        return self.weight.T.astype("float32")

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 ``[..., I]`` to float32 ``[..., O]``."""
        out = self.matmul(x, self.weight)
        return out if self.bias is None else out + self.bias


class FrozenEmbedding(Embedding):
    """An embedding in bfloat16 whose rows come out in float32, and go in where it is the head.

    Args:
        plain: its weight ``[V, E]`` is taken over.
        matmul: the op ``frozen_matmul``.
    """

    type_name = "float32"  # that the network computes in

    def __init__(self, plain: Embedding, matmul: Callable[..., Tensor]) -> None:
        nn.Layer.__init__(self)  # Embedding's own would make a second weight
        self.weight = plain.weight
        self.matmul = matmul
        self.training = plain.training

    def forward(self, x: Tensor) -> Tensor:
        """Map ids ``[...]`` to float32 ``[..., E]``."""
        flat = paddle.gather(self.weight, x.flatten()).astype("float32")
        return flat.reshape([*x.shape, self.weight.shape[1]])

    def scores(self, hidden: Tensor) -> Tensor:
        """See ``llm.llama.layers.EmbeddingLike``."""
        return self.matmul(hidden, self.weight, transposed=True)

    def lookup(self, ids_T: Tensor) -> Tensor:
        """See ``llm.llama.layers.EmbeddingLike``."""
        return super().lookup(ids_T).astype("float32")


def _wide(owner: nn.Layer, parameter: Tensor | None, value: float = 0.0) -> Tensor | None:
    if parameter is None:
        return None
    start = nn.initializer.Constant(value)
    made = owner.create_parameter(parameter.shape, dtype="float32", default_initializer=start)
    made.stop_gradient = True
    return made


def freeze(model: LlamaForCausalLM) -> None:
    """Let a network that was built in bfloat16 compute in float32, in place, before it is filled.

    Args:
        model: whole, or a stage; its quantized linears stay.
    """
    for name, layer in list(model.named_sublayers()):
        if isinstance(layer, RMSNorm):
            layer.weight = _wide(layer, layer.weight, 1.0)
        elif isinstance(layer, Embedding):
            replace_layer(model, name, FrozenEmbedding(layer, model.ops.frozen_matmul))
        elif isinstance(layer, Linear):
            replace_layer(model, name, FrozenLinear(layer, model.ops.frozen_matmul))
        elif getattr(layer, "bias", None) is not None:
            layer.bias = _wide(layer, layer.bias)
    embedding = model.model.embed_tokens
    if embedding is not None and not isinstance(embedding, Embedding):  # a quantized one
        embedding.type_name = "float32"
    for parameter in model.parameters():
        parameter.stop_gradient = True
    name_parameters(model)


def is_frozen(model: LlamaForCausalLM) -> bool:
    """Say whether :func:`freeze` was done with a network."""
    return any(isinstance(one, FrozenLinear | FrozenEmbedding) for one in model.sublayers())


def plain_linear(layer: nn.Layer) -> Linear:
    """Return a linear with the float32 numbers of one that does not train.

    Args:
        layer: with ``widened()`` and ``bias``, such as :class:`FrozenLinear`.
    """
    shape = [layer.in_features, layer.out_features]
    zeros = nn.initializer.Constant(0.0)
    weight = layer.create_parameter(shape, dtype="float32", default_initializer=zeros)
    weight.set_value(layer.widened().T)
    plain = Linear.around(weight, layer.bias)
    plain.training = layer.training
    return plain


def thawed(layer: nn.Layer) -> nn.Layer:
    """Return an ordinary float32 layer in the place of one of this module; any other as it is."""
    if isinstance(layer, FrozenLinear):
        return plain_linear(layer)
    if not isinstance(layer, FrozenEmbedding):
        return layer
    zeros = nn.initializer.Constant(0.0)
    weight = layer.create_parameter(layer.weight.shape, dtype="float32", default_initializer=zeros)
    weight.set_value(layer.weight.astype("float32"))
    return Embedding.around(weight)


def thaw(model: LlamaForCausalLM) -> None:
    """Make an ordinary float32 network of one that :func:`freeze` was done with, in place."""
    for name, layer in list(model.named_sublayers()):
        plain = thawed(layer)
        if plain is not layer:
            replace_layer(model, name, plain)
    for parameter in model.parameters():
        parameter.stop_gradient = False
    name_parameters(model)
