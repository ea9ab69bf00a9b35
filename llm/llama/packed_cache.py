"""Networks for generation, opened from packed weights that an earlier start has kept.

Packing reads, checks and turns every weight; that takes longer than everything else of a start.
What comes of it lies in a file beside the model (``llm.llama.files.packed``), which the next start
maps. Networks on one CPU process without an adapter have one; the rest packs, or not, as ever.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.devices import CPU
from external_ops import devices, native
from external_ops.modes import Modes
from llm.llama import fused_state
from llm.llama.build import build_empty, load_model, look
from llm.llama.config import TINY_NAME
from llm.llama.files.packed import (
    PackedKey,
    fingerprint,
    read_packed,
    user_directory,
    write_packed,
)
from llm.llama.fused import pack_where_possible, why_not
from llm.llama.modeling import LlamaForCausalLM

_log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
# Smaller networks are packed in less time than it takes to notice.
_WORTHWHILE = 100_000_000  # bytes


def load_packed(
    model: str | Path,
    *,
    dtype: str,
    ops: Modes | None = None,
    place: str = AUTO,
    traced: bool = False,
    packing: Mapping[str, Any],
) -> LlamaForCausalLM:
    """Load a network and pack it where it can be, from kept weights where there are some.

    Args:
        model: directory, or the name of the built-in random model.
        dtype: of the weights.
        ops: how to choose kernels, by op.
        place: where packed weights are kept: ``auto`` is beside the model, or in the user's cache
            directory where that takes no files, and only for networks that take time to pack;
            ``off`` neither reads nor keeps any; anything else is a directory.
        traced: steps will be traced for an exported program.
        packing: options of :func:`llm.llama.fused.pack`.

    Raises:
        UserError: a damaged checkpoint, a type that the device cannot compute in, or options that
            only packed networks can have.
    """
    kept = None if place == OFF else _Kept.of(model, dtype, place, packing)
    if kept is not None and devices.current() == CPU:
        network = build_empty(kept.config, dtype=dtype, ops=ops)
        if why_not(network, traced=traced) is None and kept.fill(network):
            return network
        del network
    network = load_model(model, dtype=dtype, ops=ops, use_fused_head_and_loss_fn=True, to_pack=True)
    packed = pack_where_possible(network, traced, **packing)
    if kept is not None and packed and devices.current() == CPU:
        kept.keep(network)
    return network


class _Kept:
    """Where packed weights of a model directory lie, or would.

    Args:
        directory: of the model.
        dtype, place, packing: as of :func:`load_packed`.
    """

    def __init__(self, directory: Path, dtype: str, place: str, packing: Mapping[str, Any]) -> None:
        self.config, _, tensors = look(directory)
        options = {"type": dtype}
        if packing.get("head_type", "model") != "model":
            options["head"] = f"head_{packing['head_type']}"
        if packing.get("round_activations"):
            options["inputs"] = "rounded"
        source = fingerprint(directory, set(_files(tensors)))
        self._key = PackedKey(source, native.PACKED_LAYOUT, options)
        self._asked = place != AUTO
        one_file = not directory.is_dir()  # GGUF, and there may be others beside it
        beside = directory.parent if one_file else directory
        own = self._key.shared_name(directory) if one_file else self._key.name
        places = (beside, user_directory(directory))
        self._files = [one / own for one in places if one is not None]
        if self._asked:
            shared = Path(place).resolve() != directory.resolve()
            self._files = [Path(place) / (self._key.shared_name(directory) if shared else own)]

    @classmethod
    def of(
        cls, model: str | Path, dtype: str, place: str, packing: Mapping[str, Any]
    ) -> "_Kept | None":
        """Return the place of a model directory, None of what is none."""
        directory = Path(model)
        if str(model) == TINY_NAME:
            return None
        return cls(directory, dtype, place, packing)

    def fill(self, network: LlamaForCausalLM) -> bool:
        """Make a packed network of an empty one; say whether there were weights for it."""
        for file in self._files:
            found = read_packed(file, self._key.described)
            if found is not None:
                fused_state.put_together(network, *found)
                return True
        return False

    def keep(self, network: LlamaForCausalLM) -> None:
        """Write a packed network's weights; where that cannot be, say so and go on."""
        tensors, contents = fused_state.take_apart(network)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size < _WORTHWHILE and not self._asked:
            return
        problem: OSError | None = None
        for file in self._files:
            try:
                write_packed(file, self._key.described, tensors, contents)
            except OSError as error:
                problem = error
                continue
            _log.warning(
                f"packed weights are kept in {file} ({size / 1e6:.0f} MB), for the next start; "
                "--packed_cache off keeps none"
            )
            return
        _log.warning(
            "packed weights are not kept, and every start packs anew: %s (%s)",
            self._files[-1],
            problem.strerror if problem is not None else "",
        )


def _files(tensors: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the files in which tensors lie, whole or in pieces."""
    for tensor in tensors.values():
        yield from (array.file for array in getattr(tensor, "arrays", [tensor]))
