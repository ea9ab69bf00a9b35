"""LLaMA-Factory's YAML keys as our flags.

From its ``examples/train_lora``, ``train_full``, ``train_qlora``, ``merge_lora`` and ``inference``
for Llama 3, and ``src/llamafactory/hparams``.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import jsonl
from common.errors import DataError, UserError
from common.foreign import Becomes, Idle, Only, Program, Row, Sets, Settings, Told, is_value
from llm.config.paddlenlp_training import LOGGED_EVERY, none_of, without

NAME = "LLaMA-Factory"
_NOTHING = (False, None, "")
_TEMPLATES = {
    "llama3": "llama3",
    "llama2": "llama2",
    "alpaca": "alpaca",
    "vicuna": "vicuna",
    "empty": "plain",
}
_FILE = "write {flag}: FILE; several files belong into one directory, as train-1.json, train-2.json"
_STAGES = {
    "pt": "run_pretrain.py trains on text, from a store of python -m data.prepare",
    "rm": "reward models are not trained; DPO needs none",
    "ppo": "DPO learns from preferences without sampling: stage: dpo",
    "kto": "DPO learns from pairs of answers: stage: dpo",
}


def _stage(value: Any, _: Settings) -> Settings:
    stage = str(value).lower()
    if stage in _STAGES:
        raise UserError(f"stage={value} has no counterpart here: {_STAGES[stage]}")
    if stage not in ("sft", "dpo"):
        raise UserError(f"stage={value} is neither sft nor dpo")
    return {"dpo": True} if stage == "dpo" else {}


def _file_of(key: str, flag: str) -> Sets:
    """A name of its dataset_info.json becomes the file that this calls file_name."""

    def make(value: Any, beside: Settings) -> Settings:
        if value is None:
            return {}
        index = Path(str(beside.get("dataset_dir", "data"))) / "dataset_info.json"
        try:
            content: Any = jsonl.parse(index.read_bytes())
            entry = content[value]
            file = index.parent / entry["file_name"]
        except (OSError, DataError, LookupError, TypeError):
            cure = _FILE.format(flag=flag)
            raise UserError(f"{key}={value} is not one file of {index}: {cure}") from None
        if entry.get("columns") or entry.get("tags"):
            raise UserError(
                f"{key}={value}: {index} renames its columns; write the file with alpaca's or "
                "sharegpt's own (python -m data.conversations.convert_instruct), and name it with "
                f"{flag}"
            )
        return {flag: str(file)}

    return Sets(make, f"`{flag}`: the file that dataset_info.json names")


def _tuning(value: Any, _: Settings) -> Settings:
    if not is_value(value, "lora", "full"):
        raise UserError(f"finetuning_type={value} is not there: lora and full are")
    return {"lora": True} if is_value(value, "lora") else {}


def _targets(value: Any, _: Settings) -> Settings:
    names = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    return {"lora_target_modules": ["all-linear"] if is_value(value, "all") else names}


def _adapter(value: Any, _: Settings) -> Settings:
    if value is None:
        return {}
    if "," in str(value):
        raise UserError(
            f"adapter_name_or_path={value} are several: merge all but the last (merge_lora.py)"
        )
    return {"lora_path": value}


def _cutoff(value: Any, beside: Settings) -> Settings:
    """Prompt and answer share it; there both are cut in proportion."""
    return {"max_length": value, "src_length": int(value) - 1}


def _share(value: Any, _: Settings) -> Settings:
    if float(value) > 1:
        raise UserError(
            f"val_size={value} is a number of examples, and dev_ratio a share: write 0.1 for a "
            "tenth, or dev_dataset_path: FILE"
        )
    return {"dev_ratio": value}


def _zero(value: Any, _: Settings) -> Settings:
    """The stage and the offloading in the name of one of its own files."""
    if value is None:
        return {}
    found = re.search(r"z(?:ero)?([0-3])", str(value))
    if found is None:
        raise UserError(
            f"deepspeed={value} says no stage in its name: write sharding: stage1, stage2 or "
            "stage3, with the word offload where it offloads"
        )
    stage = f"stage{found[1]}" if found[1] != "0" else ""
    return {"sharding": f"{stage} offload" if stage and "offload" in str(value) else stage}


def _bits(value: Any, _: Settings) -> Settings:
    if value is None:
        return {}
    if not is_value(value, 4, 8):
        raise UserError(f"quantization_bit={value}: a frozen base has 4 or 8 bits")
    return {"weight_quantize_algo": f"weight_only_int{int(value)}"}


def _attention(value: Any, _: Settings) -> Settings:
    return {} if is_value(value, "auto") else {"use_flash_attention": value != "disabled"}


def _recompute(value: Any, _: Settings) -> Settings:
    return {"recompute": not is_value(value, True)}


def _completed(values: Settings) -> Iterable[Told]:
    """When transformers' Trainer evaluates."""
    strategy = values.get("evaluation_strategy", "no")
    if not values.get("do_train") or strategy == "no":
        return
    if not values.get("do_eval"):
        yield Told({"do_eval": True}, f"do_eval is on, as eval_strategy={strategy} turns it on")
    if strategy == "steps" and values.get("eval_steps") is None:
        steps = values.get("logging_steps", LOGGED_EVERY)
        yield Told({"eval_steps": steps}, f"eval_steps is {steps}, there that of logging_steps")


_PURE = Sets(
    lambda value, _: {"bf16": True, "fp16_opt_level": "O2"} if is_value(value, True) else {},
    "`bf16: true` and `fp16_opt_level: O2`",
)
_REMOTE: dict[str, Row] = {
    "trust_remote_code": Idle("no code of a model directory is run"),
    **without(
        ("use_fast_tokenizer", "model_revision", "split_special_tokens"), "the files are read", True
    ),
    **without(
        ("hf_hub_token", "ms_hub_token", "om_hub_token", "cache_dir"), "nothing is fetched", None
    ),
}
_TEMPLATE = Becomes("chat_template", values=_TEMPLATES)

_LOSS = "dpo_loss_type is sigmoid, hinge or ipo"
_ROWS_ADDED = "convert_checkpoint.py --vocab_size adds rows to a model, for tokens of its tokenizer"
_GREEDY = "answers of an evaluation are greedy"
# What a file may state besides, mostly as it is anyway.
_IDLE: dict[str, Row] = {
    **none_of(
        ("resize_vocab", "new_special_tokens", "add_tokens", "add_special_tokens"), _ROWS_ADDED
    ),
    **without(
        ("low_cpu_mem_usage", "offload_folder"), "weights are read one after the other", True, None
    ),
    **without(("use_kv_cache", "use_cache"), "training needs no cache"),
    **without(("infer_backend", "infer_dtype"), "of predictions"),
    "print_param_status": Idle("the log counts what is trained", (False,)),
    **without(("use_reentrant_gc", "use_unsloth_gc"), "recomputation has one form"),
    **none_of(("mixture_of_depths", "moe_aux_loss_coef"), "every token goes through every layer"),
    "train_from_scratch": Only(_NOTHING, "run_pretrain.py starts from random weights"),
    "adapter_folder": Only((None,), "adapter_name_or_path: the adapter's own directory"),
    "pissa_convert": Idle("a PiSSA adapter is saved as plain LoRA of twice the rank", (True,)),
    "loraplus_lr_embedding": Idle("LoRA has no embeddings", (1e-6,)),
    **without(
        ("freeze_vision_tower", "freeze_multi_modal_projector", "media_dir", "image_max_pixels"),
        "Llama reads text",
    ),
    "interleave_probs": Only((None,), "files are read one after the other"),
    "ignore_pad_token_for_loss": Only((True,), "what fills rows is never learnt"),
    "eval_on_each_dataset": Only(_NOTHING, "evaluate each: dev_dataset_path with do_eval alone"),
    "tool_format": Only((None,), "the chat template writes tools and calls"),
    "default_system": Only((None,), "write it into the data, as each conversation's first message"),
    "enable_thinking": Idle("the chat template says it"),
    "data_shared_file_system": Idle("every process reads the files", (False,)),
    "disable_shuffling": Only(_NOTHING, "samples are shuffled"),
    "early_stopping_steps": Only((None,), "load_best_model_at_end keeps the best"),
    "include_effective_tokens_per_second": Idle("log lines have tokens per second"),
    "eval_num_beams": Only((None, 1), _GREEDY),
    **dict.fromkeys(("do_sample", "temperature"), Only((False, 0, None), _GREEDY)),
    **dict.fromkeys(
        ("num_beams", "length_penalty", "repetition_penalty"), Only((1.0, None), _GREEDY)
    ),
    "max_new_tokens": Only((), "tgt_length is the longest answer of an evaluation"),
    "skip_special_tokens": Idle("answers are shown without them", (True,)),
    **without(
        (
            *("galore_target", "galore_rank", "galore_update_interval", "galore_scale"),
            *("galore_proj_type", "apollo_rank", "apollo_target", "apollo_scale", "badam_mode"),
            *("badam_switch_mode", "badam_switch_interval", "badam_update_ratio"),
        ),
        "of an optimizer that is not there",
    ),
    "use_swanlab": Only(_NOTHING, "report_to visualdl or tensorboard writes event files"),
    **without(("swanlab_project", "swanlab_mode", "swanlab_run_name"), "of use_swanlab"),
    # transformers' TrainingArguments
    "lr_scheduler_kwargs": Only(
        (None, "", {}), "min_learning_rate and decay_steps shape schedules"
    ),
    "tf32": Idle("float32 is computed as float32", (False, None)),
    "fsdp": Only(_NOTHING, "sharding: stage3"),
    "fsdp_config": Idle("of fsdp", (None,)),
    "data_seed": Only((None,), "seed is that of the data, too"),
    "save_safetensors": Only((True,), "weights are always safetensors"),
    "eval_delay": Only((0, None), "eval_steps says when"),
    **none_of(("push_to_hub", "hub_model_id"), "nothing is sent"),
    **without(
        ("dataloader_pin_memory", "dataloader_persistent_workers"),
        "batches are copied as they come",
    ),
    "group_by_length": Only(_NOTHING, "packing fills rows instead"),
    "torch_compile": Idle("--ops chooses kernels", (False,)),
    "torch_empty_cache_steps": Idle("of PyTorch", (None,)),
    "auto_find_batch_size": Only(_NOTHING, "python -m llm.planner says what fits"),
    "average_tokens_across_devices": Idle(
        "losses are averaged over all labels of an update", (True,)
    ),
}

FINETUNE = Program(
    NAME,
    _REMOTE
    | {
        "stage": Sets(_stage, "`dpo: true` for dpo; the flags' own for sft"),
        "finetuning_type": Sets(_tuning, "`lora: true` for lora"),
        "lora_target": Sets(_targets, "`lora_target_modules`; all is `all-linear`"),
        "use_rslora": Becomes("rslora"),
        "create_new_adapter": Only(_NOTHING, "merge_lora.py first, and train on the result"),
        "adapter_name_or_path": Sets(_adapter, "`lora_path`"),
        "dataset": _file_of("dataset", "dataset_path"),
        "eval_dataset": _file_of("eval_dataset", "dev_dataset_path"),
        "dataset_dir": Sets(lambda value, beside: {}, "where `dataset`'s file lies"),
        "template": _TEMPLATE,
        "cutoff_len": Sets(
            _cutoff,
            "`max_length`, and `src_length` one below",
            "longer examples are an error here, and cut there; on_long: truncate cuts them",
        ),
        **without(
            (
                *("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size"),
                "buffer_size",
            ),
            "tokens are made anew, on all cores",
        ),
        "tokenized_path": Only((None,), "python -m data.prepare --task instruct makes a store"),
        "streaming": Only(_NOTHING, "python -m data.prepare --task instruct makes a store"),
        "mix_strategy": Only(("concat",), "files are read one after the other"),
        "train_on_prompt": Only(_NOTHING, "answers are learnt; a turn marked weight: 0 is not"),
        "mask_history": Only(_NOTHING, "mark earlier answers with weight: 0 in the data"),
        "neat_packing": Becomes("packing"),
        "val_size": Sets(_share, "`dev_ratio`, a share"),
        "plot_loss": Idle("output_dir has loss_curve.png"),
        "ddp_timeout": Becomes("distributed_timeout"),
        "deepspeed": Sets(_zero, "`sharding`, by the z1, z2 or z3 and the offload in its name"),
        "gradient_checkpointing": Becomes("recompute"),
        "disable_gradient_checkpointing": Sets(_recompute, "`recompute`, the other way round"),
        "flash_attn": Sets(_attention, "`use_flash_attention`; auto is the device's best"),
        "pure_bf16": _PURE,
        "optim": Only(("adamw_torch", "adamw_torch_fused", "adamw"), "the optimizer is AdamW"),
        "quantization_bit": Sets(_bits, "`weight_quantize_algo: weight_only_int4` or `_int8`"),
        **without(
            ("quantization_method", "quantization_type", "quantization_device_map"),
            "integers, in groups for 4 bits",
        ),
        "double_quantization": Idle("scales are not rounded"),
        "upcast_layernorm": Idle("norms are computed in float32"),
        "upcast_lmhead_output": Idle("losses are computed in float32"),
        "enable_liger_kernel": Idle("--ops chooses kernels"),
        "use_unsloth": Idle("--ops chooses kernels", (False,)),
        "rope_scaling": Only((None,), "config.json's rope_scaling"),
        "shift_attn": Only(_NOTHING, "attention is whole"),
        "pref_beta": Becomes("dpo_beta"),
        # dpo_loss and dpo_ftx are what they were called at first.
        **dict.fromkeys(
            ("pref_loss", "dpo_loss"),
            Becomes("dpo_loss_type", refused=dict.fromkeys(("orpo", "simpo", "kto_pair"), _LOSS)),
        ),
        **dict.fromkeys(("pref_ftx", "dpo_ftx"), Only((0,), "the loss is DPO's alone")),
        "simpo_gamma": Only((0.5,), _LOSS),
        **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), Only((1.0,), _LOSS)),
        **none_of(
            ("ref_model", "ref_model_adapters"), "the reference is the model as it was given"
        ),
        "reward_model": Only((None,), _STAGES["ppo"]),
        **_IDLE,
        **none_of(
            ("use_galore", "use_apollo", "use_badam", "use_llama_pro", "use_adam_mini", "use_muon"),
            "the optimizer is AdamW",
        ),
        "save_only_model": Idle("checkpoints are complete, so that a run can go on", (False,)),
        "compute_accuracy": Idle("evaluation has the accuracy"),
        "run_name": Idle("a run is called by its output_dir", (None,)),
        "ray_run_name": Idle("of Ray", (None,)),
        "include_num_input_tokens_seen": Idle("log lines have the tokens"),
        "remove_unused_columns": Idle("samples have the columns that are used"),
        "optim_args": Only((None,), "adam_beta1, adam_beta2 and adam_epsilon"),
        **dict.fromkeys(
            ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
            Only((), "finetuning_type is lora or full"),
        ),
        "predict_with_generate": Becomes("eval_with_do_generation"),
    },
    completes=_completed,
)
MERGE = Program(
    NAME,
    _REMOTE
    | {
        "adapter_name_or_path": Sets(_adapter, "`lora_path`"),
        "export_dir": Becomes("output_dir"),
        "export_device": Becomes("device", values={"auto": "auto"}),
        "export_size": Idle("files have 5 GB; convert_checkpoint.py --max_shard_size cuts others"),
        "export_legacy_format": Only(_NOTHING, "weights are always safetensors"),
        "template": Idle("the model's own template goes with it"),
        "finetuning_type": Only(("lora",), "only LoRA can be merged"),
        "export_quantization_bit": Only((None,), "quantize_generation.py takes the result"),
        **without(
            (
                *("export_quantization_dataset", "export_quantization_nsamples"),
                *("export_quantization_maxlen", "export_quantization_cache"),
            ),
            "of export_quantization_bit",
        ),
        "export_hub_model_id": Only((None,), "nothing is sent"),
    },
)
OPENED = Program(
    NAME,
    _REMOTE
    | {
        "adapter_name_or_path": Sets(_adapter, "`lora_path`"),
        "template": _TEMPLATE,
        "finetuning_type": Idle("adapter_config.json says it"),
        "infer_backend": Idle("the engine is ours"),
        "infer_dtype": Becomes("dtype", values={"auto": None}),
        **without(("vllm_enforce_eager", "vllm_gpu_util"), "of vLLM"),
        "vllm_maxlen": Idle("of vLLM: --max_model_len of the server, --src_length elsewhere"),
    },
)


def _chat(value: Any, _: Settings) -> Settings:
    name = str(value).lower()
    return {"chat_template": _TEMPLATES.get(name, value), "chat": True}


# Its command of that name is a chat, which its template is for.
PREDICT = Program(NAME, {"template": Sets(_chat, "`chat_template`, with `chat: true`")})
