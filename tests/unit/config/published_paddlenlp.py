"""What PaddleNLP publishes for Llama: the settings of its files, each with our script.

``llm/config/llama`` at 1e3fba3 (``lora``), 98187ec (``sft``), 9749ccd (``pretrain``), a126154
(``pt``, ``awq``), f14e0e6 (``qlora``), 136516b (``dpo``), 119d4f5 (``dpo_lora``), 2978111
(``ptq``), 390bece (``ptq_c8``), b999093 (``gptq``), 174eda6 (``fp8_ptq``), 8cf5294
(``wint8_lora``), e31a5dc and ee8d60b (``flashmask``), 2281d66 (``simpo``), 863ff0b (``kto``),
c9e1488 (``rm``); command lines of ``llm/README.md`` at 005f2ad, ``llm/docs/predict/inference.md``
at 0efaae0 and ``llm/docs/finetune.md`` at 0331b4c, whose float16 is float32: a CPU has no other.
"""

from tests.unit.config.published import Published, Settings

_8B = "meta-llama/Meta-Llama-3-8B"
_HALF: Settings = {"bf16": True, "fp16_opt_level": "O2"}
_ALL: Settings = {"do_train": True, "do_eval": True, "disable_tqdm": True}
_TUNE: Settings = {
    "model_name_or_path": _8B,
    "dataset_name_or_path": "./data",
    "output_dir": "./checkpoints/ckpts",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 16,
    "num_train_epochs": 3,
    "learning_rate": 3e-4,
    "warmup_steps": 30,
    "logging_steps": 1,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "src_length": 1024,
    "max_length": 2048,
    **_HALF,
    **_ALL,
    "load_best_model_at_end": True,
    "eval_with_do_generation": False,
    "metric_for_best_model": "accuracy",
    "recompute": True,
    "save_total_limit": 1,
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "zero_padding": False,
    "use_flash_attention": False,
}
_FLASHMASK: Settings = {
    **{name: value for name, value in _TUNE.items() if name != "num_train_epochs"},
    "max_steps": 12000,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "src_length": 8000,
    "max_length": 8192,
    "do_eval": False,
    "recompute": False,
    "tensor_parallel_degree": 2,
    "pipeline_parallel_config": "disable_p2p_cache_shape",
    "zero_padding": True,
    "unified_checkpoint": True,
    "tensor_parallel_output": True,
    "use_flash_attention": True,
    "greedy_zero_padding": True,
    "lazy": True,
    "flash_mask": True,
}
_DPO: Settings = {
    "model_name_or_path": _8B,
    "train_dataset_path": "./data/train.jsonl",
    "dev_dataset_path": "./data/dev.jsonl",
    "output_dir": "./checkpoints/dpo_ckpts",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 1,
    "num_train_epochs": 1,
    "max_steps": 100,
    "learning_rate": 1e-6,
    "warmup_steps": 10,
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 500,
    "max_seq_len": 4096,
    "max_prompt_len": 2048,
    **_HALF,
    **_ALL,
    "load_best_model_at_end": True,
    "tensor_parallel_degree": 8,
    "sharding": "stage1",
    "use_flash_attention": True,
    "flash_mask": True,
    "recompute": False,
    "recompute_granularity": "full",
    "beta": 0.1,
    "benchmark": False,
    "loss_type": "sigmoid",
    "label_smoothing": 0.0,
    "unified_checkpoint": True,
    "autotuner_benchmark": False,
    "lazy": False,
    "seed": 42,
}
_PTQ: Settings = {
    "model_name_or_path": _8B,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "eval_accumulation_steps": 16,
    "src_length": 1024,
    "max_length": 2048,
    **_HALF,
    "dataset_name_or_path": "./data",
    "output_dir": "./checkpoints/ptq_ckpts",
    "do_eval": True,
    "eval_with_do_generation": False,
    "do_ptq": True,
    "ptq_step": 16,
    "unified_checkpoint": True,
}
_SMOOTH: Settings = {
    "smooth": True,
    "smooth_step": 16,
    "smooth_all_linears": True,
    "smooth_piecewise_search": True,
    "smooth_k_piece": 3,
    "smooth_search_piece": True,
}
_T, _Q = "finetune_generation.py", "quantize_generation.py"
PADDLENLP: dict[str, Published] = {
    "pretrain": Published(
        "run_pretrain.py",
        {
            "model_name_or_path": _8B,
            "tokenizer_name_or_path": _8B,
            "input_dir": "./data",
            "output_dir": "./checkpoints/pretrain_ckpts",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16,
            "per_device_eval_batch_size": 2,
            "tensor_parallel_degree": 2,
            "pipeline_parallel_degree": 1,
            "sharding": "stage2",
            "virtual_pp_degree": 1,
            "sequence_parallel": 0,
            "use_flash_attention": True,
            "use_fused_rms_norm": True,
            "use_fused_rope": True,
            "max_seq_length": 4096,
            "learning_rate": 3e-5,
            "min_learning_rate": 3e-6,
            "warmup_steps": 30,
            "logging_steps": 1,
            "max_steps": 10000,
            "save_steps": 5000,
            "eval_steps": 1000,
            "weight_decay": 0.01,
            **_HALF,
            "warmup_ratio": 0.01,
            "max_grad_norm": 1.0,
            "dataloader_num_workers": 1,
            "continue_training": 0,
            **_ALL,
            "do_predict": True,
            "recompute": False,
            "distributed_dataloader": 1,
            "recompute_granularity": "full",
            "unified_checkpoint": True,
            "save_total_limit": 2,
        },
    ),
    "sft": Published(
        _T,
        {
            **_TUNE,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-5,
            "recompute": False,
            "pipeline_parallel_config": "disable_p2p_cache_shape",
            "sharding": "stage2",
            "unified_checkpoint": True,
        },
    ),
    "lora": Published(
        _T,
        {
            **_TUNE,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "evaluation_strategy": "steps",
            "save_strategy": "steps",
            "save_steps": 1,
            "do_eval": False,
            "sharding": "stage1",
            "lora": True,
            "use_flash_attention": True,
            "unified_checkpoint": True,
            "pissa": False,
        },
    ),
    "pt": Published(
        _T,
        {**_TUNE, "learning_rate": 3e-2, "prefix_tuning": True, "use_flash_attention": True},
    ),
    "qlora": Published(
        _T,
        {**_TUNE, "lora": True, "unified_checkpoint": True, "weight_quantize_algo": "nf4"},
        refused=("weight_quantize_algo=nf4", "weight_only_int4"),
        without=("weight_quantize_algo",),
    ),
    "wint8_lora": Published(
        _T,
        {
            **_TUNE,
            "lora": True,
            "unified_checkpoint": True,
            "weight_quantize_algo": "weight_only_int8",
        },
    ),
    "flashmask sft": Published(_T, {**_FLASHMASK, "sharding": "stage2"}),
    "flashmask lora": Published(
        _T, {**_FLASHMASK, "sharding": "stage1", "benchmark": True, "lora": True}
    ),
    "dpo": Published(_T, _DPO),
    "dpo_lora": Published(
        _T,
        {
            **_DPO,
            "learning_rate": 1e-5,
            "tensor_parallel_degree": 1,
            "lora": True,
            "lora_rank": 64,
            "rslora_plus": True,
        },
    ),
    "flashmask dpo": Published(
        _T,
        {
            **{
                name: value
                for name, value in _DPO.items()
                if name not in ("dev_dataset_path", "beta", "loss_type", "label_smoothing", "seed")
                and name != "warmup_steps"
            },
            "gradient_accumulation_steps": 2,
            "max_steps": 4000,
            "learning_rate": 5e-7,
            "warmup_ratio": 0.1,
            "tensor_parallel_degree": 4,
            "sharding": "stage2",
            "evaluation_strategy": "no",
            "save_strategy": "no",
            "do_eval": False,
            "max_seq_len": 8192,
            "max_prompt_len": 8000,
            "greedy_zero_padding": True,
            "lazy": True,
        },
        line="--dpo true",
    ),
    "simpo": Published(
        _T,
        {**_DPO, "beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo"},
        refused=("simpo_gamma=1.0", "loss_type=simpo"),
    ),
    "kto": Published(
        _T,
        {k: v for k, v in _DPO.items() if k not in ("loss_type", "label_smoothing")},
        refused=("max_prompt_len=2048", "beta=0.1", "add dpo: true for DPO"),
    ),
    "rm": Published(
        _T,
        {
            "model_name_or_path": "PKU-Alignment/alpaca-7b-reproduced",
            "train_datasets": "PKU-SafeRLHF-30K/train",
            "eval_datasets": "PKU-SafeRLHF-30K/test",
            "output_dir": "checkpoints/llama_rm",
            "eval_accumulation_steps": 1,
            "loss_type": "sequence-wise",
            "regularization": 0.001,
        },
        refused=("train_datasets=", "eval_datasets=", "loss_type=sequence-wise", "reward models"),
    ),
    "ptq": Published(_Q, {**_PTQ, **_SMOOTH}),
    "ptq_c8": Published(
        _Q,
        {
            **_PTQ,
            **_SMOOTH,
            "quant_type": "a8w8c8",
            "act_quant_method": "avg",
            "cachekv_quant_method": "avg_headwise",
        },
    ),
    "gptq": Published(
        _Q,
        {
            **{name: value for name, value in _PTQ.items() if name not in ("do_ptq", "ptq_step")},
            "do_gptq": True,
            "gptq_step": 8,
        },
    ),
    "awq": Published(
        _Q,
        {
            **_PTQ,
            "quant_type": "weight_only_int4",
            "weight_quant_method": "groupwise",
            "smooth": True,
            "auto_clip": True,
            "autoclip_step": 1,
            "do_awq": True,
        },
    ),
    "fp8_ptq": Published(
        _Q,
        {
            **_PTQ,
            "quant_type": "W8A8",
            "use_fp8": "WA",
            "fp8_type": ["e4m3", "e4m3"],
            "smooth": False,
            "weight_quant_method": "abs_max",
            "act_quant_method": "abs_max",
            "cachekv_quant_method": "abs_max",
        },
        refused=("use_fp8=WA", "fp8_type=", "A8W8"),
        without=("use_fp8", "fp8_type"),
    ),
    "predictor": Published(
        "predict_generation.py",
        line="--model_name_or_path meta-llama/Llama-2-7b-chat --inference_model --dtype float32 "
        "--block_attn",
    ),
    "predictor cache": Published(
        "predict_generation.py",
        line="--model_name_or_path meta-llama/Llama-2-7b-chat --inference_model --dtype float32 "
        "--block_attn --cachekv_int8_type dynamic",
    ),
    "predictor int8": Published(
        "predict_generation.py",
        line="--model_name_or_path meta-llama/Llama-2-7b-chat --inference_model --dtype float32 "
        "--quant_type weight_only_int8 --block_attn",
        refused=("quant_type=weight_only_int8", "quantize_generation.py"),
    ),
    "export": Published(
        "export_generation_model.py",
        line="--model_name_or_path meta-llama/Llama-2-7b-chat --inference_model --output_path "
        "./inference --dtype float32",
    ),
    "predictor static": Published(
        "infer_generation.py",
        line="--model_name_or_path ./inference --inference_model --dtype float32 --mode static",
    ),
    "flask server": Published(
        "server.py",
        line="--model_name_or_path meta-llama/Llama-2-7b-chat --port 8010 --flask_port 8012 "
        "--dtype float32",
    ),
    "merge": Published(
        "merge_lora.py",
        line="--model_name_or_path ./checkpoints/sft_ckpts --lora_path ./checkpoints/lora_ckpts "
        "--output_path ./checkpoints/lora_merge --device cpu --safe_serialization True",
    ),
}
