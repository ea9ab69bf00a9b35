"""The adapter that a finetuning run goes on from, whose files settle what flags set for a new one.

A flag that says otherwise is refused, with both values; what no flag says is taken from the files,
so that a run's resolved flags are what it trained.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.flags import meant
from llm.config.finetune import AdaptationArguments
from llm.llama.adapters.lora_config import LoRAConfig
from llm.llama.config import LlamaConfig
from llm.llama.files import peft
from llm.llama.files.peft import STARTED
from llm.train.checkpoints import Checkpoint

# By mode: PEFT's name of it, and the fields that hold what flags set.
_KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "lora": (
        "LORA",
        {
            "lora_rank": "r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
            "lora_target_modules": "target_modules",
            "rslora": "use_rslora",
            "use_dora": "use_dora",
            "pissa": "pissa",
            "pissa_iter": "pissa_iter",
            "modules_to_save": "modules_to_save",
        },
    ),
    "prefix": (
        "PREFIX_TUNING",
        {
            "num_prefix_tokens": "num_virtual_tokens",
            "prefix_projection": "prefix_projection",
            "prefix_projection_hidden_size": "encoder_hidden_size",
        },
    ),
}
SETTLED = frozenset(flag for _, fields in _KINDS.values() for flag in fields)
_MODE_FLAGS = {"lora": "--lora true", "prefix": "--prefix_tuning true"}
_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def check_mode(adaptation: AdaptationArguments, resume: Checkpoint | None) -> None:
    """Refuse to go on in another mode than the checkpoint's.

    Raises:
        UserError: names both modes and the flag.
    """
    if resume is None:
        return
    before = "full"
    if (resume.path / peft.CONFIG_NAME).is_file():
        kind = peft.read_config(resume.path).get("peft_type")
        before = next((mode for mode, (name, _) in _KINDS.items() if name == kind), str(kind))
    if before == adaptation.mode:
        return
    how = f"add {_MODE_FLAGS[before]}" if before in _MODE_FLAGS else "drop the other mode's flags"
    if before in _MODE_FLAGS and adaptation.mode != "full":
        how += f" and drop {_MODE_FLAGS[adaptation.mode].split()[0]}"
    raise UserError(
        f"{resume.path} was trained in mode {before}, this run's mode is {adaptation.mode}; {how}, "
        "or start anew in another output_dir"
    )


def find_adapter(adaptation: AdaptationArguments, resume: Checkpoint | None) -> Path | None:
    """Return the adapter to go on from, and let ``adaptation`` say what its files say.

    Raises:
        UserError: no adapter, one of another kind, or a flag that its files contradict.
    """
    if adaptation.mode == "full":
        return None
    flag = "lora_path" if adaptation.lora else "prefix_path"
    named = getattr(adaptation, flag) if resume is None else resume.path
    if named is None:
        return None
    path = Path(named)
    if not (path / peft.CONFIG_NAME).is_file():
        raise UserError(f"{flag}={path} has no {peft.CONFIG_NAME}: not an adapter in PEFT's layout")
    kind, fields = _KINDS[adaptation.mode]
    raw = peft.read_config(path, kind)
    _settle(adaptation, path, _as_trained(raw, path) if adaptation.lora else raw, fields)
    return path


def _as_trained(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what an adapter was trained as, with what old files leave out."""
    found: dict[str, Any] = {"use_dora": False, **(peft.read_beside(path, STARTED) or raw)}
    start = str(found.get("init_lora_weights", True))
    found["pissa"] = start.startswith("pissa")
    if found["pissa"]:
        found["pissa_iter"] = int(start.partition("_niter_")[2] or -1)
    found["modules_to_save"] = found.get("modules_to_save") or []
    return found


def trained_weights(
    adaptation: AdaptationArguments, config: LlamaConfig, adapter: Path | None
) -> int:
    """Return how many of the network's own numbers train.

    Args:
        adaptation: the mode, and layers that an adapter trains or adapts.
        config: the architecture.
        adapter: that the run goes on from; a new one may name nothing that the model lacks.

    Raises:
        UserError: layers that the model does not have.
    """
    if not adaptation.lora:
        return config.num_parameters if adaptation.mode == "full" else 0
    modules = tuple(adaptation.modules_to_save)
    lora = LoRAConfig(target_modules=adaptation.targets, modules_to_save=modules)
    layers = range(config.num_hidden_layers)
    names = [f"model.layers.{number}.{linear}" for number in layers for linear in config.linears]
    head = [] if config.tie_word_embeddings else ["lm_head"]
    whole = lora.modules(config)
    lora.targets([*names, *head], strict=adapter is None)
    return sum(whole.values())


def _settle(
    adaptation: AdaptationArguments, path: Path, raw: Mapping[str, Any], fields: Mapping[str, str]
) -> None:
    for flag, field in fields.items():
        if raw.get(field) is None:
            continue
        stored, asked = raw[field], getattr(adaptation, flag)
        same = _plain(stored) == _plain(asked)
        if flag in meant(adaptation) and not same:
            raise UserError(
                f"{flag}={_shown(asked)}, but the adapter {path} was made with {field}="
                f"{_shown(stored)} and goes on with that; drop the flag, or train a new adapter "
                "without --lora_path, --prefix_path and --resume_from_checkpoint"
            )
        if not same:
            setattr(adaptation, flag, [stored] if _is_word(flag, stored) else stored)


def _is_word(flag: str, stored: Any) -> bool:
    return flag == "lora_target_modules" and isinstance(stored, str)


def _plain(value: Any) -> Any:
    """One form for the ways to write a list of linears."""
    if isinstance(value, list):
        if set(value) == _LINEARS:
            return "all-linear"
        return value[0] if len(value) == 1 else sorted(map(str, value))
    return value


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
