"""mindformers' YAML files as our flags.

From ``research/llama3_1/llama3_1_8b/finetune_llama3_1_8b.yaml`` and ``configs/llama2``. Its files
have sections, whose keys are named here with the section's before a dot.
"""

from typing import Any

from common.errors import UserError
from common.foreign import Becomes, Idle, Only, Program, Row, Sets, Settings, Told, is_value
from llm.config.paddlenlp_training import without

NAME = "mindformers"
_GRAPH = "of MindSpore's graphs"
_SHAPE = "the shape is that of model_name_or_path"
_MODEL = "model.model_config"
_PET = f"{_MODEL}.pet_config"
_SCHEDULES = {
    "cosinewithwarmuplr": "cosine",
    "linearwithwarmuplr": "linear",
    "constantwarmuplr": "constant",
    "warmupstabledecaylr": "wsd",
}
_DEVICES = {"ascend": "npu", "gpu": "gpu", "cpu": "cpu"}
_WEIGHTS = "write model_name_or_path: a directory in Hugging Face's layout, no MindSpore .ckpt"


def _run_mode(value: Any, _: Settings) -> Settings:
    modes = {"train": "do_train", "finetune": "do_train", "eval": "do_eval"}
    mode = modes.get(str(value))
    if mode is None:
        raise UserError(f"run_mode={value}: predict_generation.py and server.py answer")
    return {mode: True}


def _betas(value: Any, _: Settings) -> Settings:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"optimizer.betas={value} has to be a list of two")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


def _data_parallel(value: Any, beside: Settings) -> Settings:
    """Its parallel optimizer splits the optimizer's state over these ranks."""
    if is_value(beside.get("parallel.enable_parallel_optimizer"), True) and int(value) > 1:
        return {"sharding": "stage1", "sharding_parallel_degree": value}
    return {"data_parallel_degree": value}


def _callbacks(value: Any, _: Settings) -> Settings:
    made: dict[str, Any] = {}
    names = {"save_checkpoint_steps": "save_steps", "per_print_times": "logging_steps"}
    for callback in value if isinstance(value, list) else []:
        if isinstance(callback, dict):
            made |= {flag: callback[name] for name, flag in names.items() if name in callback}
    return made


def _compute_type(value: Any, _: Settings) -> Settings:
    kinds = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": {}}
    if str(value) not in kinds:
        raise UserError(f"compute_dtype={value} is none of {', '.join(kinds)}")
    return kinds[str(value)]


def _clips(value: Any, _: Settings) -> Settings:
    return {"max_grad_norm": 1.0 if is_value(value, True) else 0}


def _pet(value: Any, _: Settings) -> Settings:
    if not is_value(value, "lora"):
        raise UserError(f"pet_type={value} is not there: lora is, and prefix_tuning: true")
    return {"lora": True}


def _micro_batches(value: Any, beside: Settings) -> Settings:
    """Of a pipeline; without one, runner_config's number counts."""
    stages = beside.get("parallel_config.pipeline_stage", 1)
    return {} if is_value(stages, 1) else {"gradient_accumulation_steps": value}


def _checkpoint(value: Any, _: Settings) -> Settings | Told:
    """Its own files state the name of a model there, which is fetched; others a file."""
    text = "" if value is None else str(value)
    if "/" in text or text.endswith(".ckpt"):
        raise UserError(f"checkpoint_name_or_path={value} has no counterpart here: {_WEIGHTS}")
    return Told({}, f"without effect: the weights of {text} are not fetched" if text else "")


def _evaluated(value: Any, _: Settings) -> Settings:
    return {} if is_value(value, -1) else {"eval_steps": value, "evaluation_strategy": "steps"}


_ROWS: dict[str, Row] = {
    "load_checkpoint": Only(("", None), _WEIGHTS),
    f"{_MODEL}.checkpoint_name_or_path": Sets(_checkpoint, "nothing: it names weights there"),
    "load_ckpt_format": Idle("weights are safetensors"),
    "eval_step_interval": Sets(
        _evaluated, "`eval_steps`, with `evaluation_strategy: steps`; -1 is none"
    ),
    "eval_epoch_interval": Only((-1,), "eval_steps says how often"),
    **without(("src_strategy_path_or_dir", "auto_trans_ckpt"), "checkpoints fit any layout"),
    "only_save_strategy": Only((False,), "python -m llm.planner shows layouts"),
    "resume_training": Becomes("resume_from_checkpoint", values={"true": "true", "false": None}),
    "run_mode": Sets(_run_mode, "`do_train` or `do_eval`"),
    "use_graceful_exit": Idle("SIGTERM ends a run after its update"),
    "trainer.type": Only(("CausalLanguageModelingTrainer",), "the network is Llama"),
    "trainer.*": Idle(_SHAPE),
    "runner_config.batch_size": Becomes("per_device_train_batch_size"),
    "runner_config.gradient_accumulation_steps": Becomes("gradient_accumulation_steps"),
    "runner_config.*": Idle(_GRAPH),
    "optimizer.type": Only(
        ("AdamW", "FP32StateAdamWeightDecay", "AdamWeightDecayX"), "the optimizer is AdamW"
    ),
    "optimizer.betas": Sets(_betas, "`adam_beta1` and `adam_beta2`"),
    "optimizer.beta1": Becomes("adam_beta1"),
    "optimizer.beta2": Becomes("adam_beta2"),
    "optimizer.eps": Becomes("adam_epsilon"),
    "optimizer.learning_rate": Becomes("learning_rate"),
    "optimizer.weight_decay": Becomes("weight_decay"),
    "lr_schedule.type": Becomes("lr_scheduler_type", values=_SCHEDULES),
    "lr_schedule.learning_rate": Becomes("learning_rate"),
    "lr_schedule.lr_end": Becomes("min_learning_rate"),
    "lr_schedule.warmup_ratio": Becomes("warmup_ratio"),
    "lr_schedule.warmup_steps": Becomes("warmup_steps"),
    "lr_schedule.total_steps": Only((-1,), "max_steps"),
    **dict.fromkeys(
        (
            *("train_dataset.data_loader.dataset_dir", "eval_dataset.data_loader.dataset_dir"),
            *("train_dataset.data_loader.dataset_files", "eval_dataset.data_loader.dataset_files"),
        ),
        Only(("", None), "MindRecord files are not read: give dataset_path or input_dir"),
    ),
    **without(
        (
            *("train_dataset.*", "train_dataset_task.*", "eval_dataset.*", "eval_dataset_task.*"),
            *("eval_callbacks", "processor.*", "metric.*"),
        ),
        "samples are made of dataset_path or input_dir",
    ),
    "use_parallel": Idle("the layout is what the parallel degrees say"),
    "parallel.*": Idle("the layout is what the parallel degrees say"),
    "parallel_config.data_parallel": Sets(
        _data_parallel,
        "`data_parallel_degree`; with enable_parallel_optimizer `sharding: stage1` over as many",
    ),
    "parallel_config.model_parallel": Becomes("tensor_parallel_degree"),
    "parallel_config.pipeline_stage": Becomes("pipeline_parallel_degree"),
    "parallel_config.context_parallel": Becomes("context_parallel_degree"),
    "parallel_config.use_seq_parallel": Becomes("sequence_parallel"),
    "parallel_config.micro_batch_num": Sets(
        _micro_batches, "`gradient_accumulation_steps` of a pipeline"
    ),
    "parallel_config.*": Idle(_GRAPH),
    "micro_batch_interleave_num": Idle(_GRAPH, (1,)),
    "recompute_config.recompute": Becomes("recompute"),
    "recompute_config.select_recompute": Only(
        (False,), "recompute_granularity: full_attn or core_attn"
    ),
    "recompute_config.*": Idle("whole layers are recomputed"),
    "callbacks": Sets(
        _callbacks, "`save_steps` and `logging_steps`, of CheckpointMonitor and MFLossMonitor"
    ),
    "context.device_target": Becomes("device", values=_DEVICES),
    "context.*": Idle(_GRAPH),
    f"{_MODEL}.compute_dtype": Sets(_compute_type, "`bf16: true` or `fp16: true`"),
    f"{_MODEL}.use_flash_attention": Becomes("use_flash_attention"),
    f"{_MODEL}.*": Idle(_SHAPE),
    "model.arch.type": Only(("LlamaForCausalLM",), "the network is Llama"),
    "runner_wrapper.use_clip_grad": Sets(_clips, "`max_grad_norm`: 1 or 0"),
    "runner_wrapper.*": Idle("float16 has scale_loss, bf16 needs none"),
    "auto_tune": Only((False,), "python -m llm.planner proposes layouts"),
    "profile": Only((False,), "nothing is profiled"),
    "layer_scale": Only((False,), "every layer has the same rate"),
    **without(
        (
            *("filepath_prefix", "autotune_per_step", "profile_start_step", "profile_stop_step"),
            *("init_start_profile", "profile_communication", "profile_memory", "layer_decay"),
            *("lr_scale_factor", "remote_save_url"),
        ),
        "of what is off",
    ),
}

PRETRAIN = Program(
    NAME,
    _ROWS
    | {
        f"{_MODEL}.seq_length": Becomes("max_seq_length"),
        "runner_config.epochs": Idle("max_steps or train_tokens says how long"),
        f"{_PET}.*": Idle("pretraining trains all weights"),
    },
)
FINETUNE = Program(
    NAME,
    _ROWS
    | {
        f"{_MODEL}.seq_length": Becomes("max_length"),
        "runner_config.epochs": Becomes("num_train_epochs"),
        f"{_PET}.pet_type": Sets(_pet, "`lora: true`"),
        f"{_PET}.lora_rank": Becomes("lora_rank"),
        f"{_PET}.lora_alpha": Becomes("lora_alpha"),
        f"{_PET}.lora_dropout": Becomes("lora_dropout"),
        f"{_PET}.target_modules": Idle("lora_target_modules; all linears are adapted"),
    },
)
