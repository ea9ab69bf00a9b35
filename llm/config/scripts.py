"""Which groups of flags each script has: what it reads, what its --help shows, what tests hold."""

from llm.config import batch, evaluation, finetune, generation, network, serving, tools, training

SCRIPTS: dict[str, tuple[type, ...]] = {
    "run_pretrain.py": (
        network.ModelArguments,
        training.DataArguments,
        training.PretrainArguments,
    ),
    "finetune_generation.py": (
        network.NetworkArguments,
        finetune.InstructArguments,
        finetune.AdaptationArguments,
        tools.QATArguments,
        finetune.FinetuneArguments,
    ),
    "predict_generation.py": (
        generation.OpenArguments,
        generation.PromptArguments,
        generation.SamplingArguments,
        generation.MergingArguments,
    ),
    "export_generation_model.py": (generation.WeightsArguments, generation.ExportArguments),
    "infer_generation.py": (
        generation.ProgramArguments,
        generation.PromptArguments,
        generation.SamplingArguments,
    ),
    "server.py": (serving.ServerArguments, generation.ProgramArguments),
    "llm.serving.batch": (batch.BatchArguments, generation.OpenArguments),
    "evaluate_generation.py": (generation.OpenArguments, evaluation.EvaluateArguments),
    "quantize_generation.py": (tools.QuantizeArguments,),
    "merge_lora.py": (tools.MergeArguments,),
    "convert_checkpoint.py": (tools.ConvertArguments,),
}
