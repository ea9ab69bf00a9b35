"""Which rank of a layout holds what of the network: a table, and questions to it.

Tensor parallelism (Shoeybi et al. 2019) splits the matrices by outputs (``column``) or by inputs
(``row``) and the embedding by tokens (``vocab``); a column's outputs are a row's inputs, so a pair
of them talks once. Everything else is ``replicated``: every tensor parallel rank holds all of it.
Names are Hugging Face's, those of this suite's adapters, or PEFT's. No paddle here: planning and
conversion use the table before any network exists.
"""

import re

from common.errors import UserError

# The linears and the embedding, by the last part of their names.
STYLES = {
    "embed_tokens": "vocab",
    "q_proj": "column",
    "k_proj": "column",
    "v_proj": "column",
    "o_proj": "row",
    "gate_proj": "column",
    "up_proj": "column",
    "down_proj": "row",
    "lm_head": "column",
}
# Norms; tables that old files carry; a prefix as it is trained and as it is stored. A prefix is
# small, and heads lie inside its rows: ranks keep all of it and use the heads that are theirs.
_REPLICATED = re.compile(
    r"(.*\.)?(\w*layernorm|norm)\.weight|.*rotary_emb\.inv_freq|prefix\..+|prompt_embeddings"
    r"|transform\.\d\.(weight|bias)|embedding\.weight"
)
_SPLIT = re.compile(
    rf"(.*\.)?(?P<layer>{'|'.join(STYLES)})\.(base\.|base_layer\.)?"
    r"(?P<kind>weight|bias|(lora|start)_[AB]|lora_magnitude_vector)(\.weight|\.default\.weight)?"
)
# What is split of a linear's parameters, by its style.
_FIRST, _SECOND, _VECTORS = (
    ("lora_A", "start_A"),
    ("lora_B", "start_B"),
    ("bias", "lora_magnitude_vector"),
)
_PARTS = {
    "column": {
        **dict.fromkeys(("weight", *_SECOND, *_VECTORS), "column"),
        **dict.fromkeys(_FIRST, "replicated"),
    },
    "row": {
        **dict.fromkeys(("weight", *_FIRST), "row"),
        **dict.fromkeys((*_SECOND, *_VECTORS), "replicated"),
    },
    "vocab": {"weight": "vocab"},
}


def _kind(name: str) -> tuple[str, str]:
    """Return (style, kind) of a parameter; the kind is the last part of its name."""
    found = _SPLIT.fullmatch(name)
    if found is not None:
        parts = _PARTS[STYLES[found["layer"]]]
        if found["kind"] in parts:
            return parts[found["kind"]], found["kind"]
    elif _REPLICATED.fullmatch(name):
        return "replicated", "weight"
    raise UserError(
        f"{name} is not in the plan of tensor parallelism, which knows the network's weights, "
        "biases, LoRA and prefixes; integer weights have to be widened first "
        "(quantize_generation.py)"
    )


def style(name: str) -> str:
    """Return how tensor parallel ranks hold a parameter.

    Args:
        name: of the parameter, such as ``model.layers.0.mlp.down_proj.weight``.

    Returns:
        ``column``, ``row``, ``vocab`` or ``replicated``.

    Raises:
        UserError: no parameter of this network.
    """
    return _kind(name)[0]


def split_axis(name: str, *, transposed: bool) -> int | None:
    """Return the axis along which tensor parallel ranks hold equal, consecutive pieces.

    Args:
        name: of the parameter.
        transposed: whether matrices of linears lie ``[out, in]``, as in Hugging Face's and PEFT's
            files; otherwise ``[in, out]``, as in the network and in PaddleNLP's files.

    Returns:
        0 or 1; None for what every rank holds whole.

    Raises:
        UserError: no parameter of this network.
    """
    how, kind = _kind(name)
    if how == "replicated":
        return None
    if how == "vocab" or kind in _VECTORS:
        return 0
    return 0 if (how == "column") == transposed else 1


def is_matrix(name: str) -> bool:
    """Say whether files in Hugging Face's layout hold the transpose of the network's matrix.

    Args:
        name: of the parameter.

    Raises:
        UserError: no parameter of this network.
    """
    how, kind = _kind(name)
    found = _SPLIT.fullmatch(name)
    return found is not None and how != "vocab" and kind not in _VECTORS
