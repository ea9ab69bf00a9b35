"""A linear with a trained low-rank product beside it: LoRA, and DoRA and PiSSA on top of it.

A low-rank product (Hu et al. 2021) is added to what a frozen linear returns. DoRA (Liu et al. 2024)
also learns the length of each column of the sum of weight and product; PiSSA
(:mod:`llm.llama.adapters.pissa`) starts the product as a part of the weight. In memory ``lora_A``
is ``[in, r]`` and ``lora_B`` ``[r, out]``, the way Paddle stores linears.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.nn import functional as F

from common.errors import UserError
from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.adapters.pissa import Factors
from llm.llama.layers import Linear
from llm.parallel.tensor import TensorLinear


@runtime_checkable
class Base(Protocol):
    """What a product can be put beside; quantized linears too (QLoRA, Dettmers et al. 2023)."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``, and pass gradients to the input."""


def mergeable(base: nn.Layer) -> bool:
    """Say whether a product can be added to a base's ``weight [in, out]``, or this rank's part."""
    return isinstance(base, Linear | TensorLinear)


def base_weight(base: nn.Layer, name: str, method: str) -> Tensor:
    """Return the float32 ``[in, out]`` that a base multiplies by, or this rank's part of it.

    Args:
        base: in floating point, or with ``widened()``.
        name: of the linear, in error messages.
        method: that asks for it, in error messages.

    Raises:
        UserError: a base that does not tell.
    """
    if mergeable(base):
        return base.weight.astype("float32")
    if not hasattr(base, "widened"):
        raise UserError(
            f"{method} reads the weights of {name}, and a {type(base).__name__} has none that can "
            "be read; use plain LoRA, or a base in floating point"
        )
    return base.widened().T


class LoRALinear(nn.Layer):
    """A frozen linear plus a trained low-rank product: ``base(x) + scaling * (x A) B``.

    Args:
        base: any :class:`Base`; merging, DoRA and PiSSA ask for its weight. Beside a linear of
            ``llm.parallel.tensor`` the product is split as that one is.
        config: of the adapter that the product is a part of.
        name: of the linear in the network, by which ``config`` has its rank and its scaling.
        start: the first A ``[in, rank]`` and B ``[rank, out]``. Where B is zero, nothing changes at
            first; PiSSA's start is subtracted for good, so that nothing changes at first either.

    Attributes:
        lora_magnitude_vector: with DoRA, ``[out]``, the length of each column of the weight that
            base and product stand for.
        start_A, start_B: with PiSSA, frozen copies of the start.
        disabled: switches everything beside the base off.

    All of it starts as float32 whatever the base computes in.

    Raises:
        UserError: DoRA over a base whose weights cannot be read, or that has a column of zeros.
    """

    plain_weight = None

    def __init__(self, base: nn.Layer, config: LoRAConfig, name: str, start: Factors) -> None:
        super().__init__()
        assert isinstance(base, Base), type(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.config, self.name = base, config, name
        self.rank, self.scaling = config.rank(name), config.scaling(name)
        self.dropout, self.disabled = config.lora_dropout, False
        self.lora_A = self._parameter("a", start.a)
        self.lora_B = self._parameter("b", start.b)
        self.start_A = self.start_B = None
        if config.is_pissa:
            self.start_A, self.start_B = self._frozen("a", start.a), self._frozen("b", start.b)
        self.lora_magnitude_vector: Tensor | None = None
        self._known_lengths: Any = None  # no buffer: it is never saved
        if config.use_dora:
            self.lora_magnitude_vector = self._magnitudes()

    def _parameter(self, which: str, whole: np.ndarray) -> Tensor:
        return self._made(which, self.own_part(which, whole))

    def _frozen(self, which: str, whole: np.ndarray) -> Tensor:
        made = self._parameter(which, whole)
        made.stop_gradient = True
        return made

    def _made(self, which: str, own: np.ndarray) -> Tensor:
        start = nn.initializer.Assign(own)
        made = self.create_parameter(list(own.shape), dtype="float32", default_initializer=start)
        if self.parallel:
            if which in self.base.split:
                made.is_distributed, made.split_axis = True, self.base.split[which]
            made.sequence_parallel = which in self.base.shares
        return made

    def _magnitudes(self) -> Tensor:
        lengths = self._lengths(self.merged(self.base_weight()))
        if not bool((lengths > 0).all()):
            raise UserError(
                f"use_dora: {self.name} has outputs whose weights are all zero, which have no "
                "direction to scale; leave it out of lora_target_modules, or use plain LoRA"
            )
        return self._made("m", lengths.numpy())

    @property
    def parallel(self) -> bool:
        """Whether the base is a tensor parallel rank's part of a linear."""
        return isinstance(self.base, TensorLinear)

    def own_part(self, which: str, whole: np.ndarray) -> np.ndarray:
        """Return this rank's part of A ("a") ``[in, r]``, B ("b") ``[r, out]`` or "m" ``[out]``."""
        if not self.parallel or which not in self.base.split:
            return whole
        return self.base.own_matrix(whole, self.base.split[which])

    def base_weight(self) -> Tensor:
        """Return the base's float32 weight ``[in, out]``, or this rank's part.

        Raises:
            UserError: a base that does not tell.
        """
        method = "use_dora" if self.config.use_dora else "pissa"
        return base_weight(self.base, self.name, method)

    def merged(self, weight: Tensor) -> Tensor:
        """Return the float32 ``[in, out]`` that base and adapter multiply by; differentiable.

        Args:
            weight: of the base, in any floating type.
        """
        merged = weight.astype("float32") + self.product()
        if self.lora_magnitude_vector is None:
            return merged
        return merged * (self.lora_magnitude_vector / self._lengths(merged))

    def product(self) -> Tensor:
        """Return float32 ``[in, out]``, what lies beside the base's weight; differentiable."""
        product = paddle.matmul(self.lora_A, self.lora_B) * self.scaling
        if self.start_A is None:
            return product
        return product - paddle.matmul(self.start_A, self.start_B) * self.scaling

    @paddle.no_grad()
    def _lengths(self, merged: Tensor) -> Tensor:
        """Return the length of each column; DoRA's gradient takes them for constants (4.3)."""
        squares = merged.detach().square().sum(axis=0)
        return (self.base.over_inputs(squares) if self.parallel else squares).sqrt()

    def _scale(self) -> Tensor:
        """Return what DoRA multiplies each output by, ``[out]``.

        Generation asks for every token, so lengths are kept until the network trains again, or
        whoever sets numbers calls :meth:`forget_lengths`.
        """
        lengths = None if self.training else self._known_lengths
        if lengths is None:
            with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
                lengths = self._lengths(self.base_weight() + self.product())
            self._known_lengths = None if self.training else lengths
        return self.lora_magnitude_vector / lengths

    def forget_lengths(self) -> None:
        """Measure DoRA's lengths again: A, B or the base have other numbers now."""
        self._known_lengths = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]`` in the type of the base's result."""
        if self.disabled:
            return self.base(x)
        out = self._frozen_part(x)
        inputs = x.astype(self.lora_A.dtype)
        drops = self.training and self.dropout > 0
        if drops:
            inputs = self._dropped(inputs)
        added = self._through(inputs, self.lora_A, self.lora_B)
        if self.lora_magnitude_vector is None:
            # In place: a third array of this size, freed among small ones that stay, is memory
            # lost.
            return out.add_(added.astype(out.dtype))
        # As in PEFT, whose scale is of what comes of dropped inputs, beside the whole base.
        scaled = self._frozen_part(inputs.astype(x.dtype)) if drops else out
        if self.base.bias is not None:
            scaled = scaled - self.base.bias
        scale = self._scale()
        change = (scale - 1) * scaled.astype(scale.dtype) + scale * added
        return out + change.astype(out.dtype)

    def _frozen_part(self, x: Tensor) -> Tensor:
        """Return what does not train: the base, less PiSSA's start."""
        out = self.base(x)
        if self.start_A is None:
            return out
        taken = self._through(x.astype(self.start_A.dtype), self.start_A, self.start_B)
        return out.subtract_(taken.astype(out.dtype))

    def _through(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = paddle.matmul(x, first) * self.scaling
        if self.parallel:
            inner = self.base.between(inner)
        return paddle.matmul(inner, second)

    def _dropped(self, x: Tensor) -> Tensor:
        whole = self.base.whole_input(x.shape) if self.parallel else x.shape
        if whole == x.shape:
            return F.dropout(x, self.dropout)
        # What one process drops: ranks have equal generators and cut their part of one mask.
        return x * self.base.own_input(F.dropout(paddle.ones(whole, x.dtype), self.dropout))


def adapted(model: nn.Layer) -> dict[str, LoRALinear]:
    """Return the linears of a network that carry a product, by name."""
    return {n: layer for n, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}


def has_lora(model: nn.Layer) -> bool:
    """Say whether a network carries a LoRA adapter."""
    return bool(adapted(model))
