"""PaddleNLP's settings of pretraining and finetuning as ours.

From ``llm/run_pretrain.py``, ``run_finetune.py`` and ``alignment/dpo/run_dpo.py``, and from the
argument classes of paddlenlp 3.0.0b4, whose defaults are meant.
"""

from collections.abc import Iterable
from typing import Any

from common.errors import UserError
from common.foreign import Becomes, Idle, Only, Program, Row, Sets, Settings, Told, is_value

NAME = "PaddleNLP"
LOGGED_EVERY = 500  # logging_steps there, where it is not given
_NOTHING = (False, None, "")
_QUANTIZE = "quantize_generation.py takes this file"
_LAYOUT = "the layout is what the parallel degrees say"
_KERNELS = "the device's best kernel is taken; --ops chooses another"
_WORDS = "they tune Paddle's own wrappers; --overlap_communication is what there is here"
_HUB = "models are directories; copy it yourself"


def none_of(names: Iterable[str], instead: str) -> dict[str, Row]:
    """Rows of what is not there: to be left off."""
    return dict.fromkeys(names, Only(_NOTHING, instead))


def without(names: Iterable[str], why: str, *usual: Any) -> dict[str, Row]:
    """Rows of what changes nothing."""
    return dict.fromkeys(names, Idle(why, usual))


def _no_cuda(value: Any, _: Settings) -> Settings:
    return {"device": "cpu"} if is_value(value, True) else {}


def _rslora_plus(value: Any, _: Settings) -> Settings:
    on = is_value(value, True)
    return {"rslora": True, "lora_plus_scale": 4.0, "lora_alpha": 4} if on else {}


ROWS: dict[str, Row] = {
    "eval_accumulation_steps": Idle("figures of an evaluation are added up batch by batch"),
    "unified_checkpoint": Idle("checkpoints are complete, and read under any layout", (False,)),
    "unified_checkpoint_config": Idle(
        "checkpoints are complete, and read under any layout; --async_save writes in a thread",
        ("",),
    ),
    "distributed_dataloader": Idle("each process reads its own samples", (False,)),
    "use_fused_rope": Idle(_KERNELS, (False,)),
    **without(
        ("use_fused_linear", "use_fused_dropout_add", "use_fast_layer_norm", "flatten_param_grads"),
        _KERNELS,
        False,
    ),
    "use_fused_linear_cross_entropy": Becomes("use_fused_head_and_loss_fn"),
    "enable_linear_fused_grad_add": Idle(_KERNELS, (False,)),
    **without(
        ("fuse_attention_qkv", "fuse_attention_ffn"),
        "matrices lie as in Hugging Face's files; convert_checkpoint.py fuses them",
        None,
        False,
    ),
    **without(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        "Llama has no dropout, nor has PaddleNLP's",
        0,
    ),
    "tensor_parallel_output": Idle("the loss is computed on the parts that the ranks have"),
    "benchmark": Idle("every log line has tokens per second", (False,)),
    "autotuner_benchmark": Only(_NOTHING, "python -m llm.planner proposes layouts"),
    "do_export": Only(_NOTHING, "export_generation_model.py exports"),
    "do_ceval": Only(_NOTHING, "evaluate_generation.py --task ceval"),
    "prediction_loss_only": Idle("evaluation keeps no logits"),
    "logging_strategy": Only(("steps",), "lines come every logging_steps"),
    **without(("log_on_each_node", "local_rank"), "the first process of all logs"),
    "save_on_each_node": Idle("each process writes its part to output_dir", (False,)),
    "no_cuda": Sets(_no_cuda, "`device: cpu`"),
    **none_of(("bf16_full_eval", "fp16_full_eval"), "evaluation has the run's own type: bf16"),
    **none_of(("amp_custom_black_list", "amp_custom_white_list"), "fp16_opt_level is O1 or O2"),
    "sharding_degree": Becomes("sharding_parallel_degree"),
    "sharding_parallel_mesh_dimension": Only(("dp",), _LAYOUT),
    "sharding_comm_buffer_size_MB": Idle(_WORDS, (-1,)),
    **without(
        ("save_sharded_model", "load_sharded_model"),
        "checkpoints are sharded as the run is, and read under any layout",
        False,
    ),
    "save_sharding_stage1_model_include_freeze_params": Idle("an adapter is saved alone", (False,)),
    **without(
        (
            *("data_parallel_config", "tensor_parallel_config", "sequence_parallel_config"),
            "sharding_parallel_config",
        ),
        _WORDS,
        "",
    ),
    **without(("fuse_sequence_parallel_allreduce", "force_reshard_pp"), _WORDS, False),
    "split_inputs_sequence_dim": Only((True,), "context parallel ranks always split sequences"),
    **dict.fromkeys(
        ("expert_parallel_degree", "expert_tensor_parallel_degree"),
        Only((-1, 1), "Llama has no experts"),
    ),
    "use_expert_parallel": Only(_NOTHING, "Llama has no experts"),
    **without(("expert_max_capacity", "expert_min_capacity"), "Llama has no experts"),
    "hybrid_parallel_topo_order": Idle("tensor parallel ranks are always neighbours", (None,)),
    "refined_recompute": Only(
        _NOTHING, "recompute_granularity and recompute_num_layers say what is recomputed"
    ),
    "no_recompute_layers": Only((None,), "recompute_num_layers recomputes the first layers only"),
    "pp_recompute_interval": Only((1,), "recompute_num_layers recomputes the first layers only"),
    "recompute_use_reentrant": Idle("recomputation has one form"),
    "offload_recompute_inputs": Becomes("recompute_offload"),
    "minimum_eval_times": Only((None,), "eval_steps says how often"),
    "dataloader_drop_last": Idle("samples go on over the end of a pass, so every batch is full"),
    "past_index": Only((-1,), "training has no memory of past steps"),
    "run_name": Idle("a run is called by its output_dir", (None,)),
    "remove_unused_columns": Idle("samples have the columns that are used"),
    "label_names": Idle("samples have the columns that are used", (None,)),
    "optim": Only(("adamw",), "the optimizer is AdamW"),
    "ddp_find_unused_parameters": Idle("gradients are summed by our own code", (None,)),
    **none_of(
        ("wandb_api_key", "wandb_http_proxy"),
        "report_to visualdl or tensorboard writes event files",
    ),
    **none_of(
        ("auto_parallel_resume_form_hybrid_parallel", "enable_auto_parallel", "to_static"), _LAYOUT
    ),
    **without(
        ("skip_memory_metrics", "skip_profile_timer"), "log lines have memory and seconds", True
    ),
    "lazy_data_processing": Idle("token stores are memory-mapped"),
    "use_async_save": Becomes("async_save"),
    "ordered_save_group_size": Idle("each process writes its own part", (0,)),
    "metrics_output_path": Only((None,), "output_dir/train_log.jsonl has every figure"),
    "output_signal_dir": Only((None,), "a checkpoint is complete when it has its own name"),
    "ckpt_quant_stage": Only(("O0",), "checkpoints are exact"),
    "ignore_load_lr_and_optim": Only(
        _NOTHING, "model_name_or_path: the checkpoint's directory, to start afresh from its weights"
    ),
    "ignore_save_lr_and_optim": Only(_NOTHING, "checkpoints are complete"),
    "tensorwise_offload_optimizer": Becomes(
        "offload_optim", values={"true": "static", "false": "off"}
    ),
    "save_rng_states": Idle("checkpoints are complete", (True,)),
    "multi_token_pred_depth": Only((0,), "the next token is predicted"),
    "release_grads": Idle("gradients are freed after each update", (False,)),
    "skip_data_intervals": Only((None,), "every sample is trained on"),
    **none_of(("pdc_download_ckpt",), _HUB),
    "pdc_download_timeout": Idle(_HUB),
    "count_trained_tokens": Idle("log lines have the tokens", (False,)),
    "pad_token_id": Idle("the tokenizer says it"),
    "num_cycles": Only((0.5,), "cosine falls once, from the peak to min_learning_rate"),
    "lr_end": Only((1e-7,), "min_learning_rate says where the rate ends"),
    "power": Only((1.0,), "lr_scheduler_type linear, cosine, constant or wsd"),
    **none_of(("from_aistudio", "save_to_aistudio"), _HUB),
    **without(
        ("aistudio_repo_id", "aistudio_token"),
        _HUB,
        None,
    ),
    **without(("aistudio_repo_private", "aistudio_repo_license"), _HUB),
}


def _completed(values: Settings) -> Iterable[Told]:
    """When a run of PaddleNLP's Trainer evaluates."""
    strategy, evaluates = values.get("evaluation_strategy", "no"), values.get("do_eval", False)
    if not values.get("do_train"):
        return
    if not evaluates and strategy != "no":
        yield Told(
            {"do_eval": True}, f"do_eval is on, as evaluation_strategy={strategy} turns it on there"
        )
    if evaluates and strategy == "no":
        strategy = "steps"
        line = "evaluation_strategy is steps, as do_eval alone means there"
        yield Told({"evaluation_strategy": strategy}, line)
    if strategy == "steps" and values.get("eval_steps") is None:
        steps = values.get("logging_steps", LOGGED_EVERY)
        yield Told({"eval_steps": steps}, f"eval_steps is {steps}, there that of logging_steps")


PRETRAIN = Program(
    NAME,
    ROWS
    | {
        "share_folder": Idle("the sample index is written once, beside the token store", (False,)),
        "skip_warmup": Idle("token stores are memory-mapped"),
        "num_hidden_layers": Only(
            (None,), "model_name_or_path: a directory whose config.json has that many"
        ),
        "num_train_epochs": Idle("max_steps or train_tokens says how long"),
        "load_best_model_at_end": Only(_NOTHING, "finetune_generation.py keeps the best model"),
        **without(("metric_for_best_model", "greater_is_better"), "no best model is kept", None),
        **without(("lora", "prefix_tuning"), "pretraining trains all weights", False),
        "flash_mask": Idle(_KERNELS, (False,)),
    },
    defaults={"logging_steps": LOGGED_EVERY, "min_learning_rate": 1e-5},
    completes=_completed,
)


def _is_preference(beside: Settings) -> bool:
    given = beside.get("dpo")
    return "loss_type" in beside or (given is not None and is_value(given, True))


def _of_preferences(name: str, flag: str) -> Sets:
    """A setting of run_dpo.py's, and of run_kto.py's, whose own has no loss_type."""

    def make(value: Any, beside: Settings) -> Settings:
        if not _is_preference(beside):
            raise UserError(
                f"{name}={value} is of DPO or of KTO, and nothing says which: add dpo: true for "
                "DPO; KTO is not there"
            )
        return {"dpo": True, flag: value}

    return Sets(make, f"`{flag}`, with `dpo: true`")


_NO_LOSS = "dpo_loss_type is sigmoid, hinge or ipo"


def _loss_type(value: Any, _: Settings) -> Settings:
    if is_value(value, "sequence-wise", "token-wise"):
        raise UserError(
            f"loss_type={value} is of reward models, which are not there; DPO needs none"
        )
    if not is_value(value, "sigmoid", "hinge", "ipo"):
        raise UserError(f"loss_type={value} has no counterpart here: {_NO_LOSS}")
    return {"dpo": True, "dpo_loss_type": value}


def _flash_mask(value: Any, beside: Settings) -> Settings:
    packs = is_value(value, True) and not _is_preference(beside)
    return {"packing": True} if packs else {}


def _differs(settings: Settings, given: frozenset[str], met: bool) -> Iterable[str]:
    """What finetuning means by the same words."""
    if not {"lora", "max_length"} <= settings.keys():  # a part of the script's groups
        return
    alpha, rank = settings["lora_alpha"], settings["lora_rank"]
    new = settings["lora"] and not settings["lora_path"]
    if new and settings["rslora"] and alpha is None and not settings["pissa"]:
        yield (
            f"rslora without lora_alpha: it is {2 * rank} here, twice the rank, and 4 there; write "
            "lora_alpha: 4 for the same"
        )
    if met and new and settings["pissa"] and alpha not in (None, rank):
        yield (
            f"pissa with lora_alpha {alpha}: its product counts {alpha} / {rank} here, 1 there; "
            "leave lora_alpha out for the same"
        )
    if met and (settings["neftune"] or settings["neftune_noise_alpha"] is not None):
        yield (
            "neftune: noise is divided by the root of tokens x hidden size here, as in the paper, "
            "and by that of batch x tokens there; neftune_noise_alpha alone switches it on here"
        )
    if met and settings["max_length"] is not None and settings["on_long"] == "error":
        yield (
            "longer examples than src_length and max_length are an error here, and cut there; "
            "on_long: truncate cuts them"
        )
    if met and not given & {"max_length", "tgt_length"}:
        yield (
            "max_length not given: there prompt and answer have 2048 tokens together, here 1024 "
            "each"
        )
    if met and settings["do_train"] and "learning_rate" not in given:
        there = "5e-05" if settings["dpo"] else "2e-05"
        rate = settings["learning_rate"]
        if f"{rate:.0e}" != there:
            yield f"learning_rate not given: it is {rate} here, and {there} there"


_QLORA = (
    "write weight_only_int4, 4-bit integers in groups, or weight_only_int8: there is no kernel for "
    "tables of values"
)
_REWARD = "reward models are not trained; DPO needs none"
_KTO = "KTO is not there; DPO is: pairs of answers, with loss_type"

FINETUNE = Program(
    NAME,
    ROWS
    | {
        "max_seq_len": Becomes("max_length"),
        "max_prompt_len": _of_preferences("max_prompt_len", "src_length"),
        "beta": _of_preferences("beta", "dpo_beta"),
        "label_smoothing": _of_preferences("label_smoothing", "dpo_label_smoothing"),
        "loss_type": Sets(_loss_type, "`dpo_loss_type`, with `dpo: true`"),
        **dict.fromkeys(("pref_loss_ratio",), Only((1,), "the loss is DPO's alone")),
        **dict.fromkeys(("sft_loss_ratio",), Only((0,), "the loss is DPO's alone")),
        "simpo_gamma": Only((0.5,), _NO_LOSS),
        "dpop_lambda": Only((50,), _NO_LOSS),
        "ref_model_update_steps": Only((-1,), "the reference is the model as it was given"),
        "reference_free": Only(_NOTHING, "the reference is the model as it was given"),
        **dict.fromkeys(("desirable_weight", "undesirable_weight"), Only((), _KTO)),
        **dict.fromkeys(
            (
                *("train_datasets", "eval_datasets", "regularization", "normalizer_type"),
                *("normalize_score_during_training", "normalizer_momentum"),
            ),
            Only((), _REWARD),
        ),
        "task_name_or_path": Becomes("dataset_path"),
        "intokens": Becomes("packing"),
        "greedy_zero_padding": Idle("rows are filled with whatever example fits", (False,)),
        "flash_mask": Sets(
            _flash_mask,
            "`packing: true`, but for preferences",
            "packing is on, as flash_mask turns zero_padding on there",
        ),
        "lazy": Idle("examples lie in memory; data.prepare makes a store of many", (False,)),
        "pad_to_multiple_of": Idle("rows are padded to multiples of 8", (None,)),
        "pad_to_max_length": Only(_NOTHING, "rows are padded to the longest of a batch"),
        "save_generation_output": Only(_NOTHING, "evaluate_generation.py --output_file"),
        "autoregressive": Only(_NOTHING, "run_pretrain.py trains on every token"),
        "use_pose_convert": Only(_NOTHING, "config.json's rope_scaling extends a context"),
        "use_long_sequence_strategies": Only(
            _NOTHING, "config.json's rope_scaling extends a context"
        ),
        "rope_scaling_factor": Only((1,), "config.json's rope_scaling extends a context"),
        **without(("strategy_type", "strategy_name"), "of use_long_sequence_strategies", None),
        **dict.fromkeys(("top_k", "top_p"), Only((1,), "answers of an evaluation are greedy")),
        **without(
            (
                *("dataset_text_field", "dataset_num_proc", "dataset_batch_size"),
                *("dataset_kwargs", "model_init_kwargs", "eval_packing"),
            ),
            "PaddleNLP's own scripts do not read it either",
        ),
        "continue_training": Only((True,), "run_pretrain.py starts from random weights"),
        "weight_quantize_algo": Becomes(
            "weight_quantize_algo",
            refused=dict.fromkeys(("nf4", "fp4", "a8w8linear", "a8w4linear", "fp8linear"), _QLORA),
        ),
        **without(
            (
                *("weight_blocksize", "weight_double_quant", "weight_double_quant_block_size"),
                *("qlora_weight_blocksize", "qlora_weight_double_quant"),
                "qlora_weight_double_quant_block_size",
            ),
            "of nf4 and fp4",
        ),
        **without(
            (
                *("quant_input_grad", "quant_weight_grad", "apply_hadamard", "hadamard_block_size"),
                *("apply_online_actscale_step", "actscale_moving_rate", "fp8_format_type"),
            ),
            "of a8w8linear, a8w4linear and fp8linear",
        ),
        "normalize_logps": Only(_NOTHING, _NO_LOSS),
        "offset_alpha": Only((0.0,), _NO_LOSS),
        "attn_implementation": Idle(_KERNELS, (None,)),
        "use_sparse_head_and_loss_fn": Idle("the loss is computed of labelled tokens anyway"),
        "lora_alpha": Becomes("lora_alpha", values={"-1": None}),
        "rslora_plus": Sets(
            _rslora_plus, "`rslora: true`, `lora_plus_scale: 4` and `lora_alpha: 4`"
        ),
        "use_quick_lora": Idle("LoRA has one form"),
        **none_of(
            (
                *("lora_use_mixer", "use_mora", "vera", "lokr", "reft", "use_ssa", "nola"),
                *("loraga", "lorapro"),
            ),
            "adapters are LoRA and prefixes",
        ),
        **without(
            (
                *("vera_rank", "vera_alpha", "vera_dropout", "nola_basis_num", "loraga_init_iters"),
                *("loraga_gradient_offload", "lorapro_x_mode", "lorapro_scaling_factor"),
            ),
            "of adapters that are not there",
        ),
        **without(
            ("lokr_dim", "lokr_path", "ssa_group_size_ratio"),
            "of adapters that are not there",
        ),
        "do_qat": Becomes("qat"),
        **none_of(("do_ptq", "do_gptq", "load_quant_model"), _QUANTIZE),
        **without(
            (
                *("quant_type", "fp8_type", "use_fp8", "skip_list_names", "weight_quant_method"),
                *("act_quant_method", "cachekv_quant_method", "search_alpha_min"),
                *("search_alpha_max", "search_scale_min", "search_scale_max", "ptq_step"),
                *("shift", "shift_all_linears", "shift_sampler", "shift_step", "smooth"),
                *("smooth_all_linears", "smooth_sampler", "smooth_step", "smooth_k_piece"),
                *("smooth_piecewise_search", "smooth_search_piece", "gptq_step", "do_awq"),
                *("auto_clip", "awq_step", "autoclip_step", "do_quant_debug", "test_sample"),
            ),
            "of quantization: quantize_generation.py",
        ),
    },
    defaults={"num_train_epochs": 1.0, "logging_steps": LOGGED_EVERY},
    completes=_completed,
    differs=_differs,
)
