"""Stages of a pipeline beside the whole network in one process."""

LIMIT = 1e-5
TWO = {"layout": {"pipeline": 2}}
CHUNKS = {
    "layout": {"pipeline": 3, "virtual_pipeline": 2},
    "config": {"num_hidden_layers": 6},
}
TIED = {"tie_word_embeddings": True}


def check(found, layers):
    """Every difference is small, no gradient is trivial, and the stages make up the network."""
    for stage in found:
        for case, result in enumerate(stage):
            assert result["loss"] <= LIMIT, (case, result)
            assert result["gradient"] <= LIMIT, (case, result)
            assert result["evaluation"] <= LIMIT, (case, result)
            assert result["largest"] > 1e-3, (case, result)
    norms = [n for stage in found for n in stage[0]["names"] if ".input_layernorm." in n]
    assert sorted(norms) == [f"model.layers.{n}.input_layernorm.weight" for n in range(layers)]


def test_two_stages(ranks):
    """Whole networks: rows of other lengths in each micro-batch and update, packed rows, pairs."""
    cases = [
        {**TWO, "config": TIED, "lengths": True, "steps": 2},
        {**TWO, "packed": True, "micro": 1, "recompute": "core_attn"},
        {**TWO, "dpo": True, "options": "disable_batch_p2p_comm"},
        {**TWO, "scaled": True},
        {**TWO, "evaluates": True},  # before the first update, whose gradients have to travel
    ]
    found = ranks(2, "jobs_pipeline:compare", cases)
    check(found, 4)
    shared = set(found[0][0]["names"]) & set(found[1][0]["names"])
    assert shared == {"model.embed_tokens.weight"}


def test_adapters_over_two_stages(ranks):
    """Also such that a stage has nothing to train."""
    cases = [
        {**TWO, "lora": {"r": 2}, "packed": True},
        {**TWO, "lora": {"r": 2, "target_modules": ".*layers.0.*"}},
        {**TWO, "lora": {"r": 2, "target_modules": ".*layers.3.*"}},
        {**TWO, "prefix": {}, "recompute": "full"},
        {**TWO, "prefix": {"prefix_projection": True}, "packed": True},
    ]
    check(ranks(2, "jobs_pipeline:compare", cases), 4)


def test_four_stages(ranks):
    cases = [{"layout": {"pipeline": 4}, "micro": 3, "config": TIED, "lengths": True}]
    check(ranks(4, "jobs_pipeline:compare", cases), 4)


def test_interleaved_chunks(ranks):
    """From as many micro-batches as there are stages to some that are no multiple."""
    cases = [
        {**CHUNKS, "micro": 3, "lengths": True},
        {
            **CHUNKS,
            "micro": 4,
            "config": {**CHUNKS["config"], **TIED},
            "options": "enable_overlap_p2p_comm",
        },
        {**CHUNKS, "micro": 7, "options": "best_unbalanced_scheduler", "packed": True},
    ]
    check(ranks(3, "jobs_pipeline:compare", cases), 6)
