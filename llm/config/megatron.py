"""Megatron-LM's command line, and what Pai-Megatron-Patch adds to it, as flags of run_pretrain.py.

From ``examples/llama/train_llama3_8b_h100_fp8.sh`` of Megatron-LM, and from Pai-Megatron-Patch's
``examples/llama3_1/run_mcore_llama3_1.sh`` and ``megatron_patch/arguments.py``.
"""

from typing import Any

from common.errors import UserError
from common.foreign import Becomes, Idle, Only, Program, Row, Sets, Settings, is_value
from llm.config.paddlenlp_training import without
from llm.parallel.rules import launched

NAME = "Megatron-LM"
_SHAPE = "the shape is that of model_name_or_path"
_OURS = "how Megatron computes; --ops chooses kernels here"
_LOGGED = "log lines have the loss, the rate, tokens per second and memory"


def _degree(beside: Settings, *names: str) -> int:
    return int(next((beside[name] for name in names if name in beside), 1))


def _micro_batch(beside: Settings) -> int:
    return int(beside.get("micro_batch_size", 1))


def _global_batch(value: Any, beside: Settings) -> Settings:
    """Micro-batches of an update on each data-parallel rank."""
    model = (
        _degree(beside, "tensor_model_parallel_size", "tensor_parallel_degree")
        * _degree(beside, "pipeline_model_parallel_size", "pipeline_parallel_degree")
        * _degree(beside, "context_parallel_size")
    )
    ranks = max(launched() // model, 1)
    steps, rest = divmod(int(value), _micro_batch(beside) * ranks)
    if rest or not steps:
        raise UserError(
            f"global_batch_size={value} is no multiple of micro_batch_size="
            f"{_micro_batch(beside)} times {ranks} data-parallel ranks: launch other processes, or "
            "write --per_device_train_batch_size and --gradient_accumulation_steps"
        )
    return {"gradient_accumulation_steps": steps}


def _batch(beside: Settings, flag: str) -> int:
    if "global_batch_size" not in beside:
        raise UserError(f"{flag} counts samples, and needs --global_batch_size beside it")
    return int(beside["global_batch_size"])


def _train_samples(value: Any, beside: Settings) -> Settings:
    steps = int(value) // _batch(beside, "train_samples")
    return {"max_steps": steps, "do_train": True}


def _samples_as(flag: str, name: str) -> Sets:
    def make(value: Any, beside: Settings) -> Settings:
        return {flag: int(value) // _batch(beside, name)}

    return Sets(make, f"`{flag}`, divided by global_batch_size")


def _decay(value: Any, beside: Settings) -> Settings:
    return {} if is_value(beside.get("lr_decay_style"), "WSD") else {"decay_steps": value}


def _evaluates(value: Any, _: Settings) -> Settings:
    return {"eval_steps": value, "do_eval": True}


def _eval_iters(value: Any, _: Settings) -> Settings:
    return {"do_eval": False} if is_value(value, 0) else {"max_evaluate_steps": value}


def _tensorboard(value: Any, _: Settings) -> Settings:
    return {"logging_dir": value, "report_to": ["tensorboard"]}


def _recompute(value: Any, _: Settings) -> Settings:
    selective = is_value(value, "selective")
    return {"recompute": True, "recompute_granularity": "core_attn" if selective else value}


def _recomputed_layers(value: Any, beside: Settings) -> Settings:
    """With uniform it is how many layers are kept together, of all that are recomputed."""
    if is_value(beside.get("recompute_method"), "uniform"):
        return {}
    return {"recompute_num_layers": value}


def _selective(value: Any, _: Settings) -> Settings:
    on = {"recompute": True, "recompute_granularity": "core_attn"}
    return on if is_value(value, True) else {}


def _sharded(value: Any, _: Settings) -> Settings:
    return {"sharding": "stage1"} if is_value(value, True) else {}


def _load(value: Any, beside: Settings) -> Settings:
    raise UserError(
        f"load={value}: Megatron's checkpoints are read by convert_checkpoint.py --input_dir "
        f"{value} --output_dir NEW; then --model_name_or_path NEW --continue_training true, or "
        "--resume_from_checkpoint true for this run's own"
    )


_TOKENIZER = "--tokenizer_name_or_path: the directory with the tokenizer's files"
_ROWS: dict[str, Row] = {
    "micro_batch_size": Becomes("per_device_train_batch_size"),
    "global_batch_size": Sets(
        _global_batch, "`gradient_accumulation_steps`, by the ranks that were launched"
    ),
    "train_iters": Sets(
        lambda value, _: {"max_steps": value, "do_train": True}, "`max_steps`, with `do_train`"
    ),
    "train_samples": Sets(_train_samples, "`max_steps`, divided by global_batch_size"),
    "lr": Becomes("learning_rate"),
    "lr_decay_style": Becomes(
        "lr_scheduler_type",
        values={"wsd": "wsd"},
        refused={"inverse-square-root": "linear, cosine, constant and wsd are there"},
    ),
    "lr_decay_iters": Sets(_decay, "`decay_steps`, but for WSD"),
    "lr_decay_samples": _samples_as("decay_steps", "lr_decay_samples"),
    "lr_warmup_iters": Becomes("warmup_steps"),
    "lr_warmup_fraction": Becomes("warmup_ratio"),
    "lr_warmup_samples": _samples_as("warmup_steps", "lr_warmup_samples"),
    "lr_wsd_decay_iters": Becomes("decay_steps"),
    "adam_eps": Becomes("adam_epsilon"),
    "clip_grad": Becomes("max_grad_norm"),
    "optimizer": Only(("adam", "hybridadam"), "the optimizer is AdamW"),
    "optimizer_offload_policy": Becomes("offload_optim"),
    "optimizer_offload_fraction": Only((1.0,), "offload_optim is off, static or auto"),
    "optimizer_cpu_offload": Becomes("offload_optim", values={"true": "static", "false": "off"}),
    "cpu_offloading": Becomes("recompute_offload"),
    "cpu_offloading_num_layers": Idle("with recompute_offload, of every layer"),
    "seq_length": Becomes("max_seq_length"),
    "data_cache_path": Becomes("data_cache"),
    "tokenizer_model": Becomes("tokenizer_name_or_path"),
    "mock_data": Only((False,), "demo.py makes a store of Python's own documentation"),
    "save": Becomes("output_dir"),
    "load": Sets(_load, "refused: convert_checkpoint.py reads it"),
    "pretrained_checkpoint": Sets(_load, "refused: convert_checkpoint.py reads it"),
    "save_interval": Becomes("save_steps"),
    "log_interval": Becomes("logging_steps"),
    "eval_interval": Sets(_evaluates, "`eval_steps`, with `do_eval`"),
    "eval_iters": Sets(_eval_iters, "`max_evaluate_steps`; 0 is no evaluation"),
    "tensorboard_dir": Sets(_tensorboard, "`logging_dir`, with `report_to: tensorboard`"),
    "num_workers": Becomes("dataloader_num_workers"),
    "context_parallel_size": Becomes("context_parallel_degree"),
    "num_layers_per_virtual_pipeline_stage": Only(
        (None,), "virtual_pp_degree: chunks of each stage"
    ),
    "num_virtual_stages_per_pipeline_rank": Becomes("virtual_pp_degree"),
    "expert_model_parallel_size": Only((1,), "Llama has no experts"),
    "use_distributed_optimizer": Sets(_sharded, "`sharding: stage1`"),
    **dict.fromkeys(
        ("overlap_grad_reduce", "overlap_param_gather"), Becomes("overlap_communication")
    ),
    "recompute_granularity": Sets(_recompute, "with `recompute: true`; selective is `core_attn`"),
    "recompute_activations": Sets(_selective, "`recompute: true`, `core_attn`"),
    "recompute_method": Idle("recompute_num_layers are the first", ("uniform", "block")),
    "recompute_num_layers": Sets(
        _recomputed_layers, "the same with block; with uniform all layers are recomputed"
    ),
    "use_flash_attn": Becomes("use_flash_attention"),
    "fp8_format": Becomes("fp8", values={"hybrid": True, "e4m3": True}),
    **without(
        ("fp8_amax_compute_algo", "fp8_amax_history_len", "fp8_interval"),
        "scales are those of each block",
    ),
    "fp8_param_gather": Idle("weights are gathered in bf16"),
    "distributed_timeout_minutes": Becomes(
        "distributed_timeout", convert=lambda minutes: 60 * int(minutes)
    ),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), Only((0,), "Llama has no dropout")),
    **without(
        (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("group_query_attention", "num_query_groups", "kv_channels", "swiglu"),
            *("max_position_embeddings", "position_embedding_type", "rotary_base"),
            *("rotary_percent", "use_rotary_position_embeddings", "normalization"),
            *("norm_epsilon", "untie_embeddings_and_output_weights", "disable_bias_linear"),
            *("init_method_std", "vocab_size", "padded_vocab_size", "extra_vocab_size"),
            *("make_vocab_size_divisible_by", "use_rope_scaling", "rope_scaling_factor"),
            *("no_position_embedding", "add_position_embedding", "add_qkv_bias"),
            *("add_bias_linear", "use_checkpoint_args", "init_method_xavier_uniform"),
        ),
        _SHAPE,
    ),
    **without(
        (
            *("transformer_impl", "attention_backend", "use_mcore_models", "manual_gc"),
            *("manual_gc_interval", "empty_unused_memory_level", "grad_reduce_in_bf16"),
            *("accumulate_allreduce_grads_in_fp32", "attention_softmax_in_fp32"),
            *("apply_query_key_layer_scaling", "no_masked_softmax_fusion", "tp_comm_overlap"),
            *("no_bias_swiglu_fusion", "no_rope_fusion", "cross_entropy_loss_fusion"),
            *("no_create_attention_mask_in_dataloader", "no_mmap_bin_files", "tiktoken_pattern"),
            *("distributed_backend", "calculate_per_token_loss", "use_torch_fsdp2"),
            *("no_gradient_accumulation_fusion", "gradient_accumulation_fusion"),
            *("no_bias_gelu_fusion", "no_bias_dropout_fusion", "no_persist_layer_norm"),
            *("no_async_tensor_model_parallel_allreduce", "no_async_tensor_parallel_allreduce"),
            *("delay_grad_reduce", "delay_param_gather", "ddp_bucket_size"),
            *("num_dataset_builder_threads", "use_tp_pp_dp_mapping", "no_initialization"),
            *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_scope"),
        ),
        _OURS,
    ),
    "apply_layernorm_1p": Only((False,), "RMSNorm's weights are stored as they are"),
    **without(
        (
            *("log_throughput", "log_timers_to_tensorboard", "log_batch_size_to_tensorboard"),
            *("log_validation_ppl_to_tensorboard", "log_params_norm", "log_num_zeros_in_grad"),
            *("log_memory_to_tensorboard", "tensorboard_queue_size", "timing_log_level"),
        ),
        _LOGGED,
    ),
    **without(
        ("no_load_optim", "no_load_rng", "no_save_optim", "no_save_rng", "ckpt_format"),
        "checkpoints are complete; weights alone are taken by continue_training",
    ),
    **without(
        (
            *("dist_ckpt_format", "use_dist_ckpt", "auto_detect_ckpt_format"),
            *(
                "ckpt_fully_parallel_save",
                "ckpt_fully_parallel_load",
                "ckpt_assume_constant_structure",
            ),
        ),
        "checkpoints are safetensors, read under any layout",
    ),
    "finetune": Only(
        (False,), "--continue_training true starts afresh from the weights of model_name_or_path"
    ),
    "exit_on_missing_checkpoint": Idle("a checkpoint that is named has to be there"),
    "override_opt_param_scheduler": Idle(
        "flags go before a checkpoint's, and what changed is said"
    ),
    "use_checkpoint_opt_param_scheduler": Idle("a resumed run keeps its schedule"),
    **dict.fromkeys(("vocab_file", "merge_file", "tokenizer_path"), Only((), _TOKENIZER)),
    "dataloader_type": Only(("single",), "samples come in the order that seed draws"),
    "rampup_batch_size": Only((None,), "batches have one size: gradient_accumulation_steps"),
    "exit_interval": Only((None,), "max_steps ends a run"),
    **dict.fromkeys(("loss_scale", "initial_loss_scale"), Becomes("scale_loss")),
    **without(
        ("min_loss_scale", "loss_scale_window", "hysteresis"), "loss scales adapt in one way"
    ),
    "no_check_for_nan_in_loss_and_grad": Idle("a loss that is none ends a run"),
    **without(
        ("wandb_project", "wandb_exp_name", "wandb_save_dir", "wandb_entity"),
        "report_to visualdl or tensorboard writes event files",
        "",
    ),
    "tensorboard_log_interval": Idle("log lines and events come every logging_steps"),
    **without(("tokenizer_type", "patch_tokenizer_type"), "the tokenizer's files say it"),
    "dataset": Only(("LLama-Pretrain-Idxmap",), "finetune_generation.py trains on examples"),
    "train_mode": Only(("pretrain",), "finetune_generation.py trains on examples"),
    "max_padding_length": Idle("samples are full"),
    "eod_mask_loss": Only((False,), "the token that ends a document is learnt"),
    **without(("reset_position_ids", "reset_attention_mask"), "documents follow each other", False),
    "exit_duration_in_mins": Idle("SIGTERM ends a run after its update"),
    **without(("profile", "profile_step_start", "profile_step_end"), "nothing is profiled"),
    **dict.fromkeys(
        ("decoupled_lr", "decoupled_min_lr"), Only((None,), "there is one learning rate")
    ),
}

PRETRAIN = Program(NAME, _ROWS)
