"""The table behind `tests.fuzz.flags`: each script's modes, and for each flag a value to try.

Words in braces are places that :mod:`tests.fuzz.flag_places` makes, ``{out}`` a fresh one. A mode
is a command line that works; a case is a value other than the default, with what both command lines
need beside it. Every flag is tried in every mode: the outcome is another, or a message names it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.arguments import GROUPS as PREPARE
from data.conversations.convert_instruct import ConvertArguments as ConvertInstruct
from data.conversations.make_task import TaskArguments
from data.merge import MergeArguments
from llm.config.scripts import SCRIPTS
from llm.planner.__main__ import PlanArguments

GROUPS: dict[str, tuple[type, ...]] = {
    **SCRIPTS,
    "data.prepare": PREPARE,
    "data.merge": (MergeArguments,),
    "data.conversations.convert_instruct": (ConvertInstruct,),
    "data.conversations.make_task": (TaskArguments,),
    "llm.planner": (PlanArguments,),
}


@dataclass(frozen=True)
class Case:
    """A value to try.

    Args:
        value: words after the flag.
        beside: words that both command lines get.
        by_mode: other values in some modes.
        says: what a refusal may say instead of the flag's name: what follows from the value.
    """

    value: str
    beside: str = ""
    by_mode: dict[str, str] = field(default_factory=dict)
    says: str = ""

    def of(self, mode: str) -> str:
        """Return the value in a mode."""
        return self.by_mode.get(mode, self.value)


def flags_of(script: str) -> set[str]:
    """Return the names of a script's flags."""
    return {one.name for group in GROUPS[script] for one in dataclasses.fields(group)}


# Flags that change speed, memory or what is logged, and nothing else; and why.
SPEED = {
    "threads": "CPU threads; sums are cut the same way",
    "device": "auto is what there is, another device is refused",
    "disable_tqdm": "the progress bar",
    "dataloader_num_workers": "who loads samples, not which",
    "distributed_timeout": "a limit of waiting; one process waits for nobody",
    "ops": "which kernel computes; forms agree within rounding (the 2x rule)",
    "use_flash_attention": "as ops",
    "use_fused_rms_norm": "as ops",
    "use_fused_head_and_loss_fn": "as ops; less memory",
    "offload_optim": "where the optimizer's state lies",
    "overlap_communication": "when sums run, not what they are",
    "recompute": "memory for time; the same bits",
    "recompute_granularity": "as recompute",
    "recompute_num_layers": "as recompute",
    "recompute_offload": "as recompute",
    "async_save": "who writes checkpoints, not what",
    "batch_size": "rows that run together; answers do not depend on company",
    "per_device_eval_batch_size": "as batch_size",
    "packed_cache": "where packed weights are kept; tests/unit/llama/test_packed_cache.py",
    "cache_blocks": "memory of the cache; too few are refused",
    "workers": "processes; the same bytes",
    "max_num_seqs": "requests that run together; answers do not depend on company",
    "max_num_batched_tokens": "how prompts are cut into steps; the same answers",
    "prompt_lookup_num_tokens": "guesses that the model checks; the same answers",
    "num_speculative_tokens": "as prompt_lookup_num_tokens",
}

# Flags that only count where something is there that no mode has: what, and whose tests hold them.
HELD = {
    "max_queue": ("more callers than are answered", "tests/e2e/test_server_http.py"),
    "max_queue_delay_microseconds": (
        "callers that come apart",
        "tests/unit/serving/test_serving_worker.py",
    ),
    "drain_seconds": ("answers that run at the end", "tests/e2e/test_server_http.py"),
    **dict.fromkeys(
        ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_crl"),
        ("certificates", "tests/e2e/test_server_tls.py"),
    ),
    "config": ("a file of MindIE's", "tests/unit/config/test_mindie.py"),
    "tool_call_parser": ("calls of tools", "tests/unit/serving/test_tool_answers.py"),
    "strict_model_name": ("a name nobody set", "tests/unit/serving/test_served_settings.py"),
    "error_file": ("a request that fails", "tests/unit/serving/test_batch.py"),
    "log_texts": ("the log that is read", "tests/unit/serving/test_access_log.py"),
    "management_port": ("another port that is asked", "tests/e2e/test_operation.py"),
    "management_host": ("another address that is asked", "tests/e2e/test_operation.py"),
    "adapter_dir": ("adapters that come later", "tests/e2e/test_operation.py"),
    "check": ("a result that is wrong", "tests/e2e/test_convert_checkpoint.py"),
    "data_cache": ("an index that is looked for", "tests/unit/train/test_pretrain_plan.py"),
    "on_bad_example": ("a bad example", "tests/unit/train/test_finetune_plan.py"),
    "on_bad_line": ("a bad line", "tests/unit/data/test_bad_prepare.py"),
    "overwrite_output_dir": ("an earlier run", "tests/unit/train/test_pretrain_plan.py"),
    "overwrite": ("an earlier result", "tests/unit/data/test_nothing_replaced.py"),
}
UNTRIED = SPEED.keys() | HELD.keys()

# Flags that may leave the outcome of a mode as it is; and why.
_NOTHING_DRAWN = "measuring given weights draws nothing"
_ROUNDING = "a rounding of logits, which tiny answers may not show; perplexity and export do"
_SERVED = ("api", "program")
_MEASURED = ("choices", "squad", "cmrc", "ceval", "gsm8k", "needle")
_ONLY = ("eval", "predict", "eval lora")
_SAYS_OFF = "saying that something is off needs no mode"
MAY_STAY = {
    **{("seed", mode): _NOTHING_DRAWN for mode in _ONLY},
    **{("head_type", mode): _ROUNDING for mode in ("greedy", "sampling", "chat", "model")},
    **{("dtype", mode): _ROUNDING for mode in ("greedy", "sampling", "chat", "model")},
    **{(flag, "batch"): _ROUNDING for flag in ("head_type", "dtype")},
    **{(flag, "W8"): _ROUNDING for flag in ("head_type", "round_activations")},
    **{("head_type", mode): _ROUNDING for mode in _MEASURED},
    **{("dtype", mode): _ROUNDING for mode in _MEASURED},
    **{
        ("cache_dtype", mode): _ROUNDING
        for mode in (
            "greedy",
            "sampling",
            "chat",
            "model",
            "W8",
            *_MEASURED,
            "batch",
        )
    },
    **{
        ("add_bos_token", mode): "shares of a few questions, and conversations; "
        "tests/unit/data/test_bos.py"
        for mode in ("choices", "ceval", "gsm8k", "needle", "batch")
    },
    ("ignore_eos", "sampling"): "a short draw may not meet the end that the greedy answer meets",
    ("ignore_eos", "W8"): "as a draw: the end is one of the model in float32",
    **{("no_ui", mode): "only the API is asked; tests/e2e/test_chat_page.py" for mode in _SERVED},
    **{("save_strategy", mode): _SAYS_OFF for mode in _ONLY},
    **{("evaluation_strategy", mode): _SAYS_OFF for mode in ("train", "on", "resume", *_ONLY)},
    **{
        (flag, "choices"): "shares of 40 questions; tests/unit/evaluation/test_choices.py"
        for flag in ("description", "answer_prompt", "lora_path", "prefix_path")
    },
    **{
        (flag, "ceval"): "shares of six questions; tests/unit/evaluation/test_exams.py"
        for flag in ("lora_path", "prefix_path", "num_few_shot")
    },
    **{
        ("model_name_or_path", mode): "the shape alone; --continue_training takes the weights"
        for mode in ("train", "train and eval", "blend")
    },
}

_NOWHERE = "/nonexistent"
_NETWORK: dict[str, Case] = {
    "model_type": Case("bert"),
    "model_name_or_path": Case("{other}"),
    "tokenizer_name_or_path": Case(_NOWHERE),
}
_RUN: dict[str, Case] = {
    "tensor_parallel_degree": Case("2"),
    "sequence_parallel": Case("true"),
    "pipeline_parallel_degree": Case("2"),
    "virtual_pp_degree": Case("2"),
    "pipeline_parallel_config": Case("disable_p2p_cache_shape"),
    "sharding": Case("stage4"),
    "sharding_parallel_degree": Case("2"),
    "data_parallel_degree": Case("2"),
    "context_parallel_degree": Case("2"),
    "context_parallel_kind": Case("ulysses"),
    "sep_parallel_degree": Case("2"),
    "output_dir": Case("{out}/elsewhere"),
    "do_train": Case("false", by_mode=dict.fromkeys(_ONLY, "true --max_steps 1")),
    "do_eval": Case(
        "true", by_mode={"train and eval": "false", "full and eval": "false", "blend": "false"}
    ),
    "do_predict": Case("true", by_mode={"predict": "false"}),
    "seed": Case("7"),
    "per_device_train_batch_size": Case("3"),
    "gradient_accumulation_steps": Case("2"),
    "max_steps": Case("3"),
    "learning_rate": Case("2e-2"),
    "min_learning_rate": Case("9e-3"),
    "lr_scheduler_type": Case("constant"),
    "warmup_ratio": Case("0.5"),
    "warmup_steps": Case("1"),
    "decay_steps": Case("1"),
    "weight_decay": Case("0.5"),
    "adam_beta1": Case("0.5"),
    "adam_beta2": Case("0.5"),
    "adam_epsilon": Case("1"),
    "max_grad_norm": Case("0.01", "--adam_epsilon 1"),
    "fp16": Case("true"),
    "bf16": Case("true"),
    "fp16_opt_level": Case("O2"),
    "fp8": Case("true"),
    "scale_loss": Case("8"),
    "amp_master_grad": Case("true"),
    "logging_steps": Case("2"),
    "logging_first_step": Case("true", "--logging_steps 2"),
    "logging_dir": Case("{out}/events", "--report_to visualdl"),
    "evaluation_strategy": Case("no"),
    "eval_steps": Case("2"),
    "eval_on_start": Case("true"),
    "max_evaluate_steps": Case("1", "--per_device_eval_batch_size 1"),
    "save_strategy": Case("no"),
    "save_steps": Case("1", by_mode={"train and eval": "2", "full and eval": "2", "blend": "2"}),
    "save_total_limit": Case("1", "--save_steps 1"),
    "resume_from_checkpoint": Case(_NOWHERE),
    "ignore_data_skip": Case("true"),
    "report_to": Case("visualdl"),
}
_SAMPLING: dict[str, Case] = {
    "src_length": Case("2"),
    "max_length": Case("1"),
    "decode_strategy": Case("sampling", by_mode={"sampling": "greedy_search"}),
    "temperature": Case("0.2"),
    "top_k": Case("3"),
    "top_p": Case("0.3"),
    "repetition_penalty": Case("5"),
    "num_beams": Case("3"),
    "length_penalty": Case("9"),
    "early_stopping": Case("true"),
    "seed": Case("7"),
    "ignore_eos": Case("false"),
}
_PLACES: dict[str, Case] = {
    "lora_path": Case("{lora}", by_mode={"lora": "{lora2}"}, says="cannot merge into"),
    "prefix_path": Case("{prefix}"),
    "round_activations": Case("true"),
    "head_type": Case("int8"),
    "model_name_or_path": Case("{other}"),
    "tokenizer_name_or_path": Case(_NOWHERE),
    "dtype": Case("bfloat16"),
    "cache_dtype": Case("int8"),
    "tensor_parallel_degree": Case("2"),
    "model_dir": Case("{program2}"),
    "model_prefix": Case("other"),
    "chat_template": Case("alpaca"),
    "add_bos_token": Case("false"),
    "draft_model_name_or_path": Case(_NOWHERE),
    "adapters": Case(f"de={_NOWHERE}"),
}
_ASKED: dict[str, Case] = {
    "prompt": Case("Hello"),
    "data_file": Case("{prompts2}"),
    "output_file": Case("{out}/elsewhere.jsonl"),
    "chat": Case("true", by_mode={"chat": "false"}),
    "adapter": Case("de"),
}

_OF_OPENING = (
    *("model_dir", "model_prefix", "tensor_parallel_degree", "chat_template"),
    *("draft_model_name_or_path", "adapters", "add_bos_token"),
)
_LONGER = Case("bfloat16", "--max_length 60")

CASES: dict[str, dict[str, Case]] = {
    "run_pretrain.py": {
        **_NETWORK,
        **_RUN,
        "continue_training": Case("true"),
        "input_dir": Case("{store2}", says="num_documents was"),
        "data_impl": Case("lazy"),
        "split": Case("5,4,1", by_mode={"predict": "5,3,2"}),
        "max_seq_length": Case("16"),
        "train_tokens": Case("100"),
        "valid_data_path": Case("{store2}", by_mode={"blend": "{store}"}),
        "test_data_path": Case("{store2}"),
        "warmup_tokens": Case("64"),
        "decay_tokens": Case("64"),
    },
    "finetune_generation.py": {
        **_NETWORK,
        **_RUN,
        "evaluation_strategy": Case("epoch", by_mode={"full and eval": "no"}),
        "task_name": Case("nothing"),
        "data_name": Case("nothing"),
        "dataset_path": Case("{squad2}"),
        "dev_dataset_path": Case("{squad2}/dev.json"),
        "max_samples": Case("5"),
        "raw_data": Case("false"),
        "dev_ratio": Case("0.5"),
        "src_length": Case("90", by_mode={"dpo": "3", "dpo lora": "3"}),
        "tgt_length": Case("2"),
        "max_length": Case("340"),
        "on_long": Case(
            "skip",
            "--src_length 150",
            by_mode=dict.fromkeys(("dpo", "dpo lora"), "skip --src_length 30"),
        ),
        "chat_template": Case("alpaca"),
        "packing": Case("true"),
        "max_seq_length": Case("400"),
        "lora": Case("true"),
        "lora_rank": Case("4"),
        "lora_alpha": Case("5"),
        "lora_dropout": Case("0.5"),
        "lora_target_modules": Case("q_proj"),
        "weight_quantize_algo": Case("weight_only_int4"),
        "base_dtype": Case("bfloat16"),
        "rslora": Case("true"),
        "use_dora": Case("true"),
        "pissa": Case("true"),
        "pissa_iter": Case("3", "--pissa", says="was made with pissa=False"),
        "lora_plus_scale": Case("4"),
        "modules_to_save": Case("embed_tokens"),
        "neftune": Case("true"),
        "neftune_noise_alpha": Case("9"),
        "lora_path": Case("{lora2}"),
        "merge_weights": Case("true"),
        "prefix_tuning": Case("true"),
        "num_prefix_tokens": Case("3"),
        "prefix_projection": Case("true"),
        "prefix_projection_hidden_size": Case("8", "--prefix_projection"),
        "prefix_path": Case("{prefix}"),
        "dpo": Case("true"),
        "dpo_beta": Case("0.5"),
        "dpo_loss_type": Case("ipo"),
        "dpo_label_smoothing": Case("0.2"),
        "qat": Case("true"),
        "qat_type": Case("W4"),
        "num_train_epochs": Case("1"),
        "load_best_model_at_end": Case("true", "--learning_rate 1"),
        "metric_for_best_model": Case("accuracy"),
        "greater_is_better": Case("true"),
        "eval_with_do_generation": Case("true"),
    },
    "predict_generation.py": {
        **_PLACES,
        **_ASKED,
        **_SAMPLING,
        "dtype": _LONGER,
        "merge_tensor_parallel_path": Case("{out}/merged"),
    },
    "infer_generation.py": {**_PLACES, **_ASKED, **_SAMPLING, "dtype": _LONGER},
    "export_generation_model.py": {
        **{name: case for name, case in _PLACES.items() if name not in _OF_OPENING},
        "output_path": Case("{out}/elsewhere"),
        "block_size": Case("8"),
        "max_model_len": Case("64"),
    },
    "server.py": {
        **_PLACES,
        "port": Case("8123"),
        "flask_port": Case("{port}"),
        "host": Case("127.0.0.2"),
        "src_length": Case("3"),
        "max_length": Case("2"),
        "max_model_len": Case("8"),
        "no_ui": Case("false", "--port 1"),
        "title": Case("other"),
        "root_path": Case("/chat"),
        "model_id": Case("other"),
        "model_alias": Case("other"),
        "max_body_bytes": Case("1024"),
        "api_key": Case("secret"),
        "api_keys": Case(_NOWHERE),
        "cors_origins": Case("chat.example.com/page"),
        "access_log": Case("{out}/no/directory/log"),
    },
    "llm.serving.batch": {
        **_PLACES,
        "chat_template": Case("alpaca", "--input_file {chats} --chat_template simple"),
        "input_file": Case("{batch2}"),
        "output_file": Case("{out}/elsewhere.jsonl"),
        "api_url": Case("http://127.0.0.1:9"),
        "concurrency": Case("3"),
        "max_retries": Case("3"),
        "request_timeout_s": Case("3"),
        "src_length": Case("2"),
        "max_length": Case("2"),
        "model_id": Case("other"),
    },
    "evaluate_generation.py": {
        **_PLACES,
        "task": Case("choices choices"),
        "data_file": Case("{text2}", by_mode={"gsm8k": "{problems2}"}),
        "data_dir": Case("{exam}"),
        "subjects": Case("logic"),
        "output_file": Case("{out}/figures.json"),
        "predictions_file": Case("{predictions}", by_mode={"predictions": "{predictions2}"}),
        "limit": Case("1"),
        "max_length": Case("16"),
        "stride": Case("8", "--max_length 16"),
        "text_format": Case("txt"),
        "wikitext_detokenize": Case("true"),
        "few_shot_file": Case("{choices}", by_mode={"gsm8k": "{problems}"}),
        "num_few_shot": Case("1", "--few_shot_file {choices}"),
        "few_shot_seed": Case("3"),
        "apply_chat_template": Case("true"),
        "context_lengths": Case("150"),
        "depths": Case("0"),
        "num_trials": Case("2"),
        "description": Case("Answer."),
        "answer_prompt": Case("So:"),
        "max_answer_tokens": Case("1"),
        "stop": Case("{letter}"),
    },
    "quantize_generation.py": {
        "model_name_or_path": Case("{other}", by_mode={"dequantize": "{w8other}"}),
        "tokenizer_name_or_path": Case(_NOWHERE),
        "output_dir": Case("{out}/elsewhere"),
        "quant_type": Case("A8W4", by_mode={"W8": "A8W8"}),
        "method": Case("gptq", by_mode={"W8 gptq": "rtn", "W4 gptq": "rtn"}),
        "group_size": Case("8"),
        "embedding_type": Case("int8"),
        "dataset_path": Case("{alpaca}"),
        "calibration_file": Case("{text2}"),
        "calibration_samples": Case("1"),
        "calibration_length": Case("16"),
        "damping": Case("1"),
        "smooth": Case("0.9"),
        "scaling": Case("search", by_mode={"W4 gptq": "none", "W8 gptq": "none"}),
        "wide_share": Case("0.5"),
        "eval_file": Case("{text2}"),
        "eval_length": Case("16"),
        "eval_limit": Case("1", "--eval_file {lines}"),
        "dequantize": Case("true"),
    },
    "merge_lora.py": {
        "model_name_or_path": Case("{other}"),
        "tokenizer_name_or_path": Case(_NOWHERE),
        "lora_path": Case("{lora2}"),
        "output_dir": Case("{out}/elsewhere"),
        "dtype": Case("bfloat16"),
        "quantize_merged": Case("true"),
    },
    "convert_checkpoint.py": {
        "input_dir": Case("{other}", says="computes something else"),
        "output_dir": Case("{out}/elsewhere"),
        "output_format": Case("pdparams", by_mode={"ranks": "hf"}),
        "tensor_parallel_degree": Case("2"),
        "pipeline_parallel_degree": Case("2"),
        "fuse_attention_qkv": Case("true"),
        "fuse_attention_ffn": Case("true"),
        "dtype": Case("bfloat16"),
        "gguf_type": Case("q8_0", "--output_format gguf"),
        "vocab_size": Case("1030"),
        "max_shard_size": Case("0.0002"),
        "check_only": Case("true", says="is not a model directory|is not empty"),
    },
    "data.prepare": {
        "task": Case("instruct", "--input {both}", by_mode={"instruct": "pretrain"}),
        "input": Case("{text2}"),
        "tokenizer": Case(_NOWHERE),
        "output_prefix": Case("{out}/elsewhere"),
        "input_format": Case("parquet"),
        "format": Case("npy"),
        "json_key": Case("other"),
        "txt_documents": Case("line"),
        "dtype": Case("int32"),
        "append_eos": Case("true"),
        "prepend_bos": Case("true"),
        "shard": Case("1/2", by_mode={"shard": "2/2"}),
        "chat_template": Case("alpaca"),
        "src_length": Case("2"),
        "tgt_length": Case("2"),
        "on_long": Case("skip", "--src_length 150"),
    },
    "data.merge": {
        "input": Case("{store2}/s"),
        "output_prefix": Case("{out}/elsewhere"),
        "format": Case("npy"),
    },
    "data.conversations.convert_instruct": {
        "input": Case("{alpaca2}"),
        "output": Case("{out}/elsewhere.jsonl"),
        "to": Case("sharegpt"),
        "format": Case("sharegpt", says="no 'conversations'"),
        "prompt": Case("alpaca"),
    },
    "data.conversations.make_task": {
        "name": Case("reverse"),
        "output_dir": Case("{out}/elsewhere"),
        "train": Case("5"),
        "dev": Case("5"),
        "seed": Case("7"),
    },
    "llm.planner": {
        "gpu": Case("A100"),
        "gpu_memory": Case("300"),
        "gpus": Case("2"),
        "gpus_per_node": Case("1", "--gpus 8"),
        "num_proposals": Case("1", "--gpus 4"),
        "plan_file": Case("{out}/plan.json"),
    },
}


def merged(line: str, words: str) -> list[str]:
    """Return the words of a command line with those of another, whose flags take precedence.

    A flag without a value gets its ``true``.
    """
    result: dict[str, list[str]] = {}
    for word in f"{line} {words}".split():
        if word.startswith("--"):
            result[word] = []
            at = word
        else:
            result[at].append(word)
    return [word for name, values in result.items() for word in (name, *(values or ["true"]))]


def value_of(text: Any, places: dict[str, str]) -> list[str]:
    """Return the words of a command line, with places filled in."""
    return [word.format_map(places) for word in str(text).split()]
