"""Pieces of the network for a pipeline: what a stage runs, and what it shares with other stages."""

from llm.llama.modeling import LlamaForCausalLM


def mark_stage_shared(model: LlamaForCausalLM) -> None:
    """Mark the parameters that other stages hold too as ``stage_shared``.

    Those are a tied embedding, which the first and the last stage hold, and a prefix, which every
    stage holds. Their gradients have to be summed over these stages before an update.
    """
    stage = model.stage
    if stage is None or (stage.first and stage.last):
        return
    if model.config.tie_word_embeddings and (stage.first or stage.last):
        model.model.embed_tokens.weight.stage_shared = True
    if model.prefix is not None:
        for parameter in model.prefix.parameters():
            parameter.stage_shared = True
