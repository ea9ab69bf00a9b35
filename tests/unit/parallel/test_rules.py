"""Every impossible layout is refused with the value, the rule and the nearest one that fits."""

import dataclasses

import pytest

from common.errors import UserError
from llm.config.training import PretrainArguments
from llm.llama.config import TINY_NAME, RopeScaling, load_config
from llm.parallel.rules import check_shape, resolve, sequence_unit

FLAGS = PretrainArguments(do_train=True, max_steps=1)
# 8 query heads over 4 key/value heads, 6 layers.
MODEL = dataclasses.replace(
    load_config(TINY_NAME),
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=6,
    vocab_size=256,
    head_dim=8,
)
TP, PP = "tensor_parallel_degree", "pipeline_parallel_degree"

# flags, processes, message
DEGREES = {
    "more than launched": (
        {TP: 4},
        1,
        "multiple of 4 processes, launched: 1; start 4 with",
    ),
    "product over launched": ({TP: 4, PP: 4}, 8, "multiple of 16 processes, launched: 8"),
    "remainder": ({TP: 4}, 6, "launched: 6; set tensor_parallel_degree=3, or start 4 or 8"),
    "remainder of stages": ({PP: 4}, 6, "set pipeline_parallel_degree=3, or start 4 or 8"),
    "remainder of sequence parts": (
        {"context_parallel_degree": 4},
        6,
        "set context_parallel_degree=3",
    ),
    "two kinds of sequence split": (
        {"context_parallel_degree": 2, "sep_parallel_degree": 2},
        4,
        "keep one",
    ),
    "unknown word": ({"sharding": "stage4"}, 2, "'stage4' is not one of stage1, stage2, stage3"),
    "two stages": ({"sharding": "stage1 stage2"}, 2, "names 2 stages; keep one"),
    "offload alone": ({"sharding": "offload"}, 2, "names no stage; add stage1"),
    "degree without stage": (
        {"sharding_parallel_degree": 2},
        2,
        "without sharding: add --sharding stage1",
    ),
    "sharding of the rest": (
        {"sharding": "stage1", "sharding_parallel_degree": 3},
        4,
        "the nearest that does: data_parallel_degree=1 and sharding_parallel_degree=4",
    ),
    "copies": ({"data_parallel_degree": 3}, 4, "the nearest that does: data_parallel_degree=4"),
    "copies and sharding": (
        {"sharding": "stage2", "sharding_parallel_degree": 2, "data_parallel_degree": 4},
        4,
        "the nearest that does: data_parallel_degree=2 and sharding_parallel_degree=2",
    ),
    "zero shards": (
        {"sharding": "stage1", "sharding_parallel_degree": 0},
        2,
        "give a positive number, or -1",
    ),
    "zero copies": ({"data_parallel_degree": 0}, 2, "data_parallel_degree=0"),
    "interleaving without stages": (
        {"virtual_pp_degree": 2},
        1,
        "needs pipeline_parallel_degree of 3 or more",
    ),
    "interleaving over two stages": (
        {"virtual_pp_degree": 2, PP: 2},
        2,
        "set virtual_pp_degree=1 or more stages",
    ),
}

# flags, processes, sizes of the model, row length, micro-batches, message
SHAPES = {
    "key/value heads": ({TP: 8}, 8, {}, 16, 1, "num_key_value_heads=4; tensor_parallel_degree=4"),
    "feed-forward": (
        {TP: 4},
        4,
        {"intermediate_size": 90},
        16,
        1,
        "intermediate_size=90; tensor_parallel_degree=2",
    ),
    "vocabulary": (
        {TP: 4},
        4,
        {"vocab_size": 258},
        16,
        1,
        "vocab_size=258; tensor_parallel_degree=2",
    ),
    "more stages than layers": (
        {PP: 8},
        8,
        {},
        16,
        8,
        "exceeds the model's num_hidden_layers=6; pipeline_parallel_degree=6",
    ),
    "chunks that do not divide": (
        {PP: 3, "virtual_pp_degree": 4},
        3,
        {},
        16,
        3,
        "does not divide the model's num_hidden_layers=6; virtual_pp_degree=2 fits",
    ),
    "micro-batches of interleaving": (
        {PP: 3, "virtual_pp_degree": 2},
        3,
        {},
        16,
        2,
        "gradient_accumulation_steps=3 fits",
    ),
    "rows of sequence parallel": (
        {TP: 4, "sequence_parallel": True},
        4,
        {},
        18,
        1,
        "a multiple of 4; a length of 16 fits",
    ),
    "rows of a ring": (
        {"context_parallel_degree": 4},
        4,
        {},
        20,
        1,
        "multiple of 8; a length of 16",
    ),
    "rows of ulysses": ({"sep_parallel_degree": 4}, 4, {}, 18, 1, "a multiple of 4"),
    "heads of ulysses": (
        {"sep_parallel_degree": 3, TP: 2},
        6,
        {},
        18,
        1,
        "multiple of its num_key_value_heads=2; sep_parallel_degree=2 fits",
    ),
    "rotary scaling by the length of a row": (
        {"context_parallel_degree": 2},
        2,
        {"rope_scaling": RopeScaling("dynamic", factor=2.0)},
        16,
        1,
        "dynamic rotary scaling depends on the length of the whole row",
    ),
}


def layout(flags, world):
    return resolve(dataclasses.replace(FLAGS, **flags), world)


@pytest.mark.parametrize("case", DEGREES)
def test_degrees_are_refused(case):
    flags, world, message = DEGREES[case]
    with pytest.raises(UserError) as refusal:
        layout(flags, world)
    assert message in str(refusal.value)


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_are_refused(case):
    flags, world, sizes, length, batches, message = SHAPES[case]
    config = dataclasses.replace(MODEL, **sizes)
    with pytest.raises(UserError) as refusal:
        check_shape(layout(flags, world), config, seq_length=length, micro_batches=batches)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "world", "degrees"),
    [
        ({}, 1, {}),
        ({}, 4, {"data": 4}),
        ({TP: -1, PP: -1}, 2, {"data": 2}),
        ({TP: 2, PP: 2}, 8, {"tensor": 2, "pipeline": 2, "data": 2}),
        ({"sharding": "stage2"}, 4, {"sharding": 4, "sharding_stage": 2}),
        ({"sharding": "stage2"}, 1, {}),
        (
            {"sharding": "stage1 offload", "sharding_parallel_degree": 2},
            4,
            {"sharding": 2, "sharding_stage": 1, "data": 2},
        ),
        (
            {"sharding": "stage1", "data_parallel_degree": 2},
            8,
            {"sharding": 4, "sharding_stage": 1, "data": 2},
        ),
        ({"sep_parallel_degree": 2}, 2, {"context": 2, "context_kind": "ulysses"}),
        ({"sequence_parallel": True}, 1, {}),
    ],
)
def test_what_is_not_given_is_what_remains(flags, world, degrees):
    found = dataclasses.asdict(layout(flags, world))
    expected = dataclasses.asdict(layout({}, 1)) | degrees
    assert found == expected


def test_a_suggested_layout_is_accepted():
    for case in ("key/value heads", "rows of a ring"):
        flags, _, sizes, length, batches, _ = SHAPES[case]
        config = dataclasses.replace(MODEL, **sizes)
        if TP in flags:
            fitting = layout({TP: 4}, 4)
        else:
            fitting, length = layout(flags, 4), 16
        check_shape(fitting, config, seq_length=length, micro_batches=batches)
        assert length % sequence_unit(fitting) == 0
