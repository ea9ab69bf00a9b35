"""Tensors of a model directory that its network does not read: each kind is looked at.

A second output matrix beside tied embeddings is compared with them, and kept where it differs, as
transformers 5 does; stored rotary frequencies are compared with config.json's; heads for other
purposes (values, rewards, classes) are named; anything else is refused.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from common.notes import say_once
from llm.llama.config import LlamaConfig
from llm.llama.files.dtypes import Array
from llm.llama.files.rank_layout import EMBEDDING, HEAD
from llm.llama.rope import inverse_frequencies

FREQUENCIES = "rotary_emb.inv_freq"
# Heads that stand beside the language model's: they take no part in its logits.
_OTHER_HEADS = re.compile(
    r"(pretrained_model\.)?(score|classifier|v_head|value_head|reward_head|regression_head"
    r"|critic_head|qa_outputs|rm_head)(\..+)?"
)
_QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|SCB|weight_format|weight\.(absmax|quant_map|quant_state\..*)"
    r"|weight_(packed|scale|scale_inv|shape|zero_point)|input_scale)"
)
_PREFIXES = ("pretrained_model.", "base_model.model.", "module.", "_orig_mod.", "transformer.")
# Relative rounding of the stored type; float16 has few digits for small frequencies.
_ROUNDING = {"F64": 1e-5, "F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}
_SMALL = 1e-7
_ROWS = 1 << 22  # numbers of a matrix that are compared at a time

_log = logging.getLogger(__name__)


class _Readable(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, part: tuple[slice, ...] = ()) -> Array: ...


def check_names(
    place: Path, wanted: Iterable[str], found: Iterable[str], tied: bool = False
) -> None:
    """Refuse weights that lack a tensor of a model, or have one that it has no place for.

    Args:
        place: directory or file, for the message.
        wanted: names that the model has.
        found: names that there are.
        tied: the model shares embedding and output matrix.

    Raises:
        UserError: names that differ.
    """
    wanted, found = set(wanted), set(found)
    spare = {name for name in found - wanted if not name.endswith(FREQUENCIES)}
    if tied:
        spare.discard(HEAD)  # `settle` has compared it
    heads = {name for name in spare if _OTHER_HEADS.fullmatch(name)}
    for names, what in ((wanted - found, "lacks"), (spare - heads, "has unexpected")):
        if names:
            some = sorted(names)
            shown = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if some[3:] else "")
            why = _why(wanted, found, heads)
            raise UserError(f"{place} {what} {shown}: config.json describes another model{why}")
    if heads:
        say_once(
            _log,
            f"{place} holds {len(heads)} tensors of another head ({', '.join(sorted(heads)[:3])}), "
            "which takes no part in answers: it is not loaded, and not in what is made of this",
        )


def _why(wanted: set[str], found: set[str], heads: set[str]) -> str:
    """Say what the names look like, to whoever wonders which model this is."""
    spare = found - wanted
    prefix = next((p for p in _PREFIXES if any(n.startswith(p) for n in spare - heads)), None)
    if any(_QUANTIZED.fullmatch(name) for name in spare):
        return " (these are quantized weights; config.json's quantization_config says otherwise)"
    if any("lora_" in name for name in spare):
        return " (these are an adapter's; give the directory as --lora_path)"
    if prefix is not None:
        return f" (names begin with {prefix!r}; save the inner model's weights alone)"
    if HEAD in wanted - found and heads:
        return f" (its head is {min(heads)}, which scores texts; generation needs {HEAD})"
    for part, key in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        biases = re.compile(rf"model\.layers\.\d+\.{part}\.\w+\.bias")
        for names, value in ((spare, "true"), (wanted - found, "false")):
            if any(biases.fullmatch(name) for name in names):
                return f" (would {key}={value} be right? All of a layer's {part} have one, or none)"
    return ""


def settle(place: Path, config: LlamaConfig, tensors: Mapping[str, _Readable]) -> LlamaConfig:
    """Compare what a directory says twice; return the config of the network that it holds.

    Args:
        place: the directory.
        config: of its config.json.
        tensors: what its files hold; some are read.

    Returns:
        The config; with ``tie_word_embeddings`` false where the files' output matrix is not the
        embedding, whatever config.json says.
    """
    _compare_frequencies(place, config, tensors)
    if not config.tie_word_embeddings or not {HEAD, EMBEDDING} <= tensors.keys():
        return config
    if same(tensors[EMBEDDING], tensors[HEAD]):
        return config
    say_once(
        _log,
        f"{place}: config.json says tie_word_embeddings=true, but {HEAD} is another matrix than "
        f"{EMBEDDING}: both are kept, as if it said false",
    )
    return config.replace(tie_word_embeddings=False)


def same(one: _Readable, other: _Readable) -> bool:
    """Return whether two matrices hold equal numbers; nan equals nothing."""
    if one.shape != other.shape:
        return False
    step = max(1, _ROWS // max(1, one.shape[-1]))
    for start in range(0, one.shape[0], step):
        rows = (slice(start, start + step),)
        if not np.array_equal(one.read(rows), other.read(rows)):
            return False
    return True


def _compare_frequencies(
    place: Path, config: LlamaConfig, tensors: Mapping[str, _Readable]
) -> None:
    """Say so where stored frequencies are not config.json's; the network computes its own."""
    stored = {name: tensor for name, tensor in tensors.items() if name.endswith(FREQUENCIES)}
    if not stored:
        return
    plain = config.replace(rope_scaling=type(config.rope_scaling)())
    # Scaling was once applied to positions, and stored frequencies were those without it.
    right = [inverse_frequencies(one) for one in (plain, config)]

    def agrees(tensor: _Readable) -> bool:
        rounding = _ROUNDING.get(tensor.dtype, 0.0)
        values = tensor.read().astype(np.float64)
        return any(
            values.shape == one.shape and np.allclose(values, one, rtol=rounding, atol=_SMALL)
            for one in right
        )

    wrong = sorted(name for name, tensor in stored.items() if not agrees(tensor))
    if wrong:
        say_once(
            _log,
            f"{place}: {len(wrong)} of {len(stored)} stored rotary frequencies ({wrong[0]}) are "
            f"not those of config.json (rope_theta={config.rope_theta:g}, "
            f"{config.rope_scaling.rope_type}): config.json's are used, as transformers does",
        )
