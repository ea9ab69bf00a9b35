"""Quantized linears of which each process holds a part of the integers; for inference.

O outputs, I inputs, N groups of inputs that share a scale, P processes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from paddle import Tensor, nn

from common.errors import UserError
from llm.llama.files.slots import Slot
from llm.llama.layers import replace_layer
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.files import quantized_slots
from llm.llama.quantization.linear import QuantizedLinear
from llm.llama.quantization.network import linears
from llm.parallel.pieces import share, whole_shape
from llm.parallel.topology import Topology


class _Part:
    """Stands for a whole tensor of a file, of which this process keeps a part."""

    def __init__(self, own: Tensor, axis: int | None, topology: Topology) -> None:
        self._own, self._axis, self._topology = own, axis, topology
        self.shape = whole_shape(own.shape, axis, topology)

    def set_value(self, whole: Tensor) -> None:
        """Keep this process's part."""
        part = share(self.shape, self._axis, self._topology)
        self._own.set_value(whole[part].contiguous() if part else whole)

    def numpy(self) -> np.ndarray:
        """Nobody saves what was opened for generation."""
        raise NotImplementedError


class SharedQuantizedLinear(QuantizedLinear):
    """This process's part of a quantized linear: of its outputs, or of its inputs.

    Args:
        plain: the linear that it replaces, without values.
        row: whether inputs are split, so that the products are summed; outputs otherwise.
        config: widths and groups.
        topology: the running job.
        total: sums over the processes.
        name: in error messages.

    Raises:
        UserError: integers that cannot be split so.
    """

    def __init__(
        self,
        plain: nn.Layer,
        row: bool,
        config: QuantConfig,
        topology: Topology,
        total: Callable[[Tensor], Tensor],
        name: str,
    ) -> None:
        size_in, size_out = plain.weight.shape
        parts = topology.layout.tensor
        refused = f"tensor_parallel_degree={parts} does not split {name}: "
        if row and config.activation_bits is not None:
            raise UserError(
                f"{refused}{config.kind} rounds all inputs of a token on one scale, and no process "
                "has all of them; use one process, or W8 or W4 (quantize_generation.py)"
            )
        groups = config.groups(size_in, name)
        if row and groups > 1 and groups % parts:
            raise UserError(
                f"{refused}its inputs have {groups} groups of scales; use a number of processes "
                "that divides them"
            )
        own_in, own_out = (size_in // parts, size_out) if row else (size_in, size_out // parts)
        bias = plain.bias
        if bias is not None and not row:
            bias = plain.create_parameter(
                [own_out], dtype=bias.dtype, default_initializer=nn.initializer.Constant(0.0)
            )
            bias.is_distributed, bias.split_axis = True, 0
        super().__init__(own_in, own_out, config, bias, name)
        self._topology, self._row, self._total = topology, row, total

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., I]`` to ``[..., O]``: of outputs this process's, of inputs all's sum."""
        if not self._row:
            return super().forward(x)
        out = self._total(self.matmul(x, self.weight, self.weight_scale, transposed=True))
        return out if self.bias is None else out + self.bias

    def slots(self, name: str) -> dict[str, Slot]:
        """See ``llm.llama.files.slots.StoresItself``: those of the whole linear."""
        axis = 1 if self._row else 0
        # One scale for all inputs is everybody's.
        of_scale = None if self._row and self.weight_scale.shape[1] == 1 else axis
        weight: Any = _Part(self.weight, axis, self._topology)
        scale: Any = _Part(self.weight_scale, of_scale, self._topology)
        return quantized_slots(name, weight, scale, self.config)


def install_shares(
    model: LlamaForCausalLM,
    config: QuantConfig,
    topology: Topology,
    total: Callable[[Tensor], Tensor],
    style: Callable[[str], str],
) -> None:
    """Replace a new network's linears by this process's parts of quantized ones, in place.

    Args:
        model: whole, without values.
        config: widths and groups.
        topology: the running job.
        total: sums over the processes.
        style: of a parameter by name, see ``llm.llama.placement``.

    Raises:
        UserError: integers that cannot be split over the processes.
    """
    if config.embedding is not None:
        raise UserError(
            f"tensor_parallel_degree={topology.layout.tensor} does not split an embedding of "
            "integers; use one process, or quantize again without it (quantize_generation.py)"
        )
    found: Sequence[tuple[str, Any]] = list(linears(model, config).items())
    for name, plain in found:
        row = style(f"{name}.weight") == "row"
        layer = SharedQuantizedLinear(plain, row, config.of(name), topology, total, name)
        layer.training, layer.matmul = plain.training, model.ops.frozen_matmul
        replace_layer(model, name, layer)
