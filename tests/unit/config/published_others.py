"""What others publish for Llama: the settings of their files, each with our script.

LLaMA-Factory: ``examples`` at 13d252f, 01fa59b, 03da9a7, 24073f5, 083dbee, 13e6173. mindformers:
``research/llama3_1`` at 0e67b43. Megatron-LM: ``examples/llama`` at 157006d. Pai-Megatron-Patch:
``examples/llama3_1`` at 1a7758c.
"""

from tests.unit.config.published import Published, Settings

_LF: Settings = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/llama3-8b/lora/sft",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
_MINDFORMERS: Settings = {
    "seed": 0,
    "output_dir": "./output",
    "load_checkpoint": "",
    "src_strategy_path_or_dir": "",
    "auto_trans_ckpt": False,
    "only_save_strategy": False,
    "resume_training": False,
    "run_mode": "train",
    "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "llama3_1_8b"},
    "runner_config": {"epochs": 2, "batch_size": 1, "sink_mode": True, "sink_size": 1},
    "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8},
    "lr_schedule": {
        "type": "CosineWithWarmUpLR",
        "learning_rate": 1e-5,
        "lr_end": 0.0,
        "warmup_ratio": 0.03,
        "total_steps": -1,
    },
    "train_dataset": {
        "data_loader": {"type": "MindDataset", "dataset_dir": "", "shuffle": True},
        "input_columns": ["input_ids", "labels"],
        "batch_size": 6,
    },
    "train_dataset_task": {"type": "CausalLanguageModelDataset"},
    "do_eval": False,
    "use_parallel": True,
    "parallel": {"parallel_mode": 1, "full_batch": True, "enable_parallel_optimizer": True},
    "parallel_config": {
        "data_parallel": 8,
        "model_parallel": 1,
        "pipeline_stage": 1,
        "use_seq_parallel": False,
        "micro_batch_num": 1,
        "vocab_emb_dp": True,
        "gradient_aggregation_group": 4,
    },
    "micro_batch_interleave_num": 1,
    "recompute_config": {"recompute": True, "select_recompute": False, "mp_comm_recompute": True},
    "callbacks": [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMonitor", "save_checkpoint_steps": 10000, "async_save": False},
    ],
    "context": {"mode": 0, "device_target": "Ascend", "max_device_memory": "58GB"},
    "model": {
        "model_config": {
            "type": "LlamaConfig",
            "seq_length": 8192,
            "hidden_size": 4096,
            "compute_dtype": "bfloat16",
            "use_flash_attention": True,
            "checkpoint_name_or_path": "",
        },
        "arch": {"type": "LlamaForCausalLM"},
    },
    "runner_wrapper": {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
    "auto_tune": False,
    "profile": False,
    "layer_scale": False,
    "lr_scale_factor": 256,
}
_MEGATRON = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --max-position-embeddings 8192 "
    "--position-embedding-type rope --rotary-base 1000000 --attention-dropout 0.0 "
    "--hidden-dropout 0.0 --swiglu --untie-embeddings-and-output-weights --disable-bias-linear "
    "--seq-length 8192 --micro-batch-size 1 --global-batch-size 128 --lr 0.00015 --min-lr 0.00001 "
    "--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 "
    "--bf16 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 "
    "--log-throughput --tensor-model-parallel-size 1 --num-workers 1 --data-path data/store "
    "--save checkpoints/llama3 --tensorboard-dir logs"
)
_MCORE = (
    "--use-mcore-models --kv-channels 128 --rotary-percent 1.0 --init-method-std 0.0134 "
    "--attention-backend fused --train-samples 1953125000 --lr-decay-samples 1949218748 "
    "--lr-warmup-samples 3906252 --grad-reduce-in-bf16 --cross-entropy-loss-fusion "
    "--calculate-per-token-loss --manual-gc --empty-unused-memory-level 1 "
    "--exit-duration-in-mins 235 --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer "
    "--data-cache-path cache --split 99,1,0 --no-create-attention-mask-in-dataloader "
    "--no-mmap-bin-files --vocab-size 128256 --profile --profile-step-start 4 "
    "--profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 "
    "--apply-layernorm-1p --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --load checkpoints/llama3"
)
_PAI = (
    "--train-iters 1000 --lr-decay-iters 1000 --lr-warmup-iters 10 --init-method-std 0.008 "
    "--max-padding-length 8192 --tensorboard-queue-size 1 --log-timers-to-tensorboard "
    "--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --no-load-optim "
    "--no-load-rng --extra-vocab-size 256 --patch-tokenizer-type LLama3Tokenizer "
    "--normalization RMSNorm --norm-epsilon 1e-05 --use-rotary-position-embeddings "
    "--no-save-optim --split 99,1,0 --dataset LLama-Pretrain-Idxmap --transformer-impl "
    "transformer_engine --recompute-method uniform --recompute-num-layers 1 "
    "--recompute-granularity full --use-distributed-optimizer --train-mode pretrain"
)


_T = "finetune_generation.py"
OTHERS: dict[str, Published] = {
    "lf lora sft": Published(
        _T,
        _LF,
        suffix=".yaml",
        line="--dataset_path data",
        refused=("dataset=identity,alpaca_en_demo", "dataset_path"),
        without=("dataset",),
    ),
    "lf lora dpo": Published(
        _T,
        {**_LF, "stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid", "learning_rate": 5e-6},
        suffix=".yaml",
        line="--dataset_path data",
        refused=("dataset=identity,alpaca_en_demo",),
        without=("dataset",),
    ),
    "lf full sft": Published(
        _T,
        {
            **{k: v for k, v in _LF.items() if not k.startswith("lora")},
            "finetuning_type": "full",
            "deepspeed": "examples/deepspeed/ds_z3_config.json",
        },
        suffix=".yaml",
        line="--dataset_path data",
        refused=("dataset=identity,alpaca_en_demo",),
        without=("dataset",),
    ),
    "lf qlora sft": Published(
        _T,
        {
            **{k: v for k, v in _LF.items() if k not in ("lora_rank", "trust_remote_code")},
            "quantization_bit": 4,
            "quantization_method": "bitsandbytes",
            "val_size": 0.1,
            "per_device_eval_batch_size": 1,
            "eval_strategy": "steps",
            "eval_steps": 500,
        },
        suffix=".yaml",
        line="--dataset_path data",
        refused=("dataset=identity,alpaca_en_demo",),
        without=("dataset",),
    ),
    "lf pretrain": Published(
        _T, {**_LF, "stage": "pt"}, suffix=".yaml", refused=("stage=pt", "run_pretrain.py")
    ),
    "lf merge": Published(
        "merge_lora.py",
        {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "template": "llama3",
            "trust_remote_code": True,
            "export_dir": "output/llama3_lora_sft",
            "export_size": 2,
            "export_device": "cpu",
            "export_legacy_format": False,
        },
        suffix=".yaml",
    ),
    "lf inference": Published(
        "predict_generation.py",
        {
            "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
            "adapter_name_or_path": "saves/llama3-8b/lora/sft",
            "template": "llama3",
            "finetuning_type": "lora",
            "trust_remote_code": True,
            "infer_backend": "huggingface",
        },
        suffix=".yaml",
    ),
    "mindformers finetune": Published(
        _T,
        _MINDFORMERS,
        suffix=".yaml",
        line="--model_name_or_path model --dataset_path data --device cpu",
    ),
    "mindformers pretrain": Published(
        "run_pretrain.py",
        _MINDFORMERS,
        suffix=".yaml",
        line="--model_name_or_path model --input_dir data --device cpu --max_steps 10",
    ),
    "megatron": Published(
        "run_pretrain.py",
        line=f"{_MEGATRON} {_MCORE}",
        refused=("apply_layernorm_1p", "decoupled_lr", "decoupled_min_lr", "convert_checkpoint.py"),
        without=("apply-layernorm-1p", "decoupled-lr", "decoupled-min-lr", "load"),
    ),
    "pai": Published("run_pretrain.py", line=f"{_MEGATRON} {_PAI}"),
}
