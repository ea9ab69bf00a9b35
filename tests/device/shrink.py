"""A recipe for GPUs, shrunken by stated rules until it runs on the rehearsal device in seconds.

What makes a recipe what it is stays: precision, recomputation, adapters, packing, schedule, which
degrees there are, how query heads share keys, rotary scaling, tied embeddings. What only makes it
large shrinks: :data:`RULES` says how, :func:`cannot_show` what a rehearsal therefore leaves open.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.flags import read_config_file
from llm.config.scripts import SCRIPTS
from llm.llama.config import TINY_NAME, LlamaConfig, load_config
from llm.planner.__main__ import FINETUNE, PRETRAIN, script_of

RANKS = 4
ROW, PROMPT, ANSWER = 64, 48, 16
STEPS = 4
RULES = f"""\
layers        2, or as many as the pipeline has pieces
heads         2 key heads, or one for each tensor rank; query heads in the recipe's ratio
head size     an eighth; a multiple of 8, as FlashAttention demands, stays one and others stay none
feed-forward  in the recipe's ratio to the hidden size
vocabulary    that of the built-in tokenizer
rows          at most {ROW} tokens, prompts {PROMPT}, answers {ANSWER}; micro-batches of 2 at most
updates       {STEPS}, of 2 micro-batches a pipeline stage at most; saved and measured after 2
ranks         {RANKS} at most: every degree above 1 becomes 2, and where more than two are left,
              two at a time, each pair in a rehearsal of its own
data          random documents, or the sample that ships"""
# Degrees in the order in which layouts are written.
DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "sep_parallel_degree",
    "sharding_parallel_degree",
    "data_parallel_degree",
)
# Of the user's machine: files, reports, how long it takes.
_DROPPED = (
    *("input_dir", "dataset_path", "output_dir", "tokenizer_name_or_path", "chat_template"),
    *("train_tokens", "num_train_epochs", "report_to", "warmup_ratio", "warmup_steps"),
    *("metric_for_best_model", "model_type", *DEGREES),
)


@dataclass(frozen=True)
class Rehearsal:
    """One run of a shrunken recipe.

    Args:
        name: of the recipe.
        script: that reads it, without its ending.
        shape: the network.
        degrees: those above 1, by flag.
        flags: all others.
        dropped: degrees of the recipe that this run does without, by flag.
    """

    name: str
    script: str
    shape: LlamaConfig
    degrees: dict[str, int]
    flags: dict[str, Any]
    dropped: dict[str, int]

    @property
    def ranks(self) -> int:
        """Processes, with a device each."""
        return math.prod(self.degrees.values())

    @property
    def layout(self) -> str:
        """The degrees in words."""
        parts = [f"{name.removesuffix('_parallel_degree')} {n}" for name, n in self.degrees.items()]
        return " x ".join(parts) or "one device"

    @property
    def pretrains(self) -> bool:
        """Whether samples are rows of a store, which one rank takes as several do."""
        return self.script == "run_pretrain"


def cuts(degrees: dict[str, int]) -> list[dict[str, int]]:
    """Return degrees of at most :data:`RANKS` ranks that together have every pair of these."""
    names = [name for name, degree in degrees.items() if degree > 1]
    if len(names) == 1:
        return [{names[0]: 4 if degrees[names[0]] % 4 == 0 else 2}]
    pairs = itertools.combinations(names, 2) if len(names) > 2 else [tuple(names)]
    return [dict.fromkeys(pair, 2) for pair in pairs]


def head_size(size: int) -> int:
    """Return an eighth of a head, a multiple of 8 where it was one."""
    return max(8, size // 8 // 8 * 8) if size % 8 == 0 else 12


def shape_of(config: LlamaConfig, tensor: int, pieces: int) -> LlamaConfig:
    """Shrink a network.

    Args:
        config: the recipe's.
        tensor: ranks that split every matrix.
        pieces: of the pipeline, over all ranks.
    """
    tiny = load_config(TINY_NAME)
    groups = max(2, tensor)
    heads = groups * (config.num_attention_heads // config.num_key_value_heads)
    size = head_size(config.head_dim or config.hidden_size // config.num_attention_heads)
    hidden = heads * size
    step = 8 * tensor
    return config.replace(
        vocab_size=tiny.vocab_size,
        hidden_size=hidden,
        intermediate_size=math.ceil(hidden * config.intermediate_size / config.hidden_size / step)
        * step,
        num_hidden_layers=max(2, pieces),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        bos_token_id=tiny.bos_token_id,
        eos_token_id=tiny.eos_token_id,
        pad_token_id=tiny.pad_token_id,
    )


def _flags(recipe: dict[str, Any], degrees: dict[str, int]) -> dict[str, Any]:
    flags = {name: value for name, value in recipe.items() if name not in _DROPPED}
    stages = degrees.get("pipeline_parallel_degree", 1)
    flags["max_steps"] = STEPS
    flags |= {"logging_steps": 1, "save_steps": STEPS // 2, "eval_steps": STEPS // 2}
    flags |= {"report_to": "none", "disable_tqdm": True, "device": "gpu"}
    for name, most in (
        ("per_device_train_batch_size", 2),
        ("per_device_eval_batch_size", 2),
        ("gradient_accumulation_steps", 2 * stages),
        ("dataloader_num_workers", 1),
        ("max_evaluate_steps", 2),
        ("max_seq_length", ROW),
        ("src_length", PROMPT),
        ("tgt_length", ANSWER),
        ("lora_rank", 4),
        ("virtual_pp_degree", 2),
    ):
        if name in flags:
            flags[name] = min(flags[name], most)
    if flags.get("packing"):
        flags["max_seq_length"] = 2 * ROW
    if flags.get("evaluation_strategy") == "epoch":
        flags |= {"evaluation_strategy": "steps", "save_strategy": "steps"}
    if "tensor_parallel_degree" not in degrees:
        flags.pop("sequence_parallel", None)
    return flags


def rehearsals(recipe: str | Path) -> list[Rehearsal]:
    """Return the runs that show a recipe: one, or one for each pair of its degrees.

    Raises:
        UserError: a file that no training script reads, or a network of no known name.
    """
    path = Path(recipe)
    settings = read_config_file(path)
    groups = script_of([str(path)])
    script = "run_pretrain" if groups is PRETRAIN else "finetune_generation"
    assert groups in (PRETRAIN, FINETUNE) and f"{script}.py" in SCRIPTS
    config = load_config(known_name(str(settings["model_name_or_path"])))
    degrees = {name: settings[name] for name in DEGREES if settings.get(name, 1) > 1}
    made = []
    for cut in cuts(degrees) if degrees else [{}]:
        flags = _flags(settings, cut)
        pieces = cut.get("pipeline_parallel_degree", 1) * flags.get("virtual_pp_degree", 1)
        shape = shape_of(config, cut.get("tensor_parallel_degree", 1), pieces)
        if script == "finetune_generation":
            flags["task_name"] = "preference" if settings.get("dpo") else "squad"
        dropped = {name: n for name, n in degrees.items() if name not in cut}
        made.append(Rehearsal(path.stem, script, shape, cut, flags, dropped))
    return made


def known_name(place: str) -> str:
    """Return the name by which a shape is known that a recipe gives as a directory."""
    is_name = "/" in place and not place.startswith((".", "/"))
    return place if is_name or Path(place).is_dir() else Path(place).name


def cannot_show(run: Rehearsal) -> list[str]:
    """Return what a rehearsal leaves open, a sentence each."""
    lines = [
        "speed, and whether the real sizes fit (python -m llm.planner predicts both)",
        "numerics of CUDA kernels beyond one rounding of their results, and their races",
        "NCCL's own rules, links between machines, and more than four ranks",
        "convergence: four updates of random numbers say nothing about it",
    ]
    if run.dropped:
        left = ", ".join(name.removesuffix("_parallel_degree") for name in run.dropped)
        lines.append(f"{left} together with {run.layout}: other pairs are other rehearsals")
    return lines
