"""Which sequences of a step go where, and where their keys lie, planned on the host."""

import numpy as np
import pytest

from external_ops.block_decoder import longest_single, plan_step
from llm.llama.cache import choose_block_size
from llm.llama.seams import CacheLayout

BLOCK, HEADS, POSITIONS = 32, 2, 65536
# Start and number of tokens of each sequence of a step, then what should become of it.
STEPS = {
    "prompts": ([(0, 5), (0, 1)], "pp"),
    "single tokens": ([(7, 1), (3000, 1)], "ss"),
    "a prompt, a later part and a single token": ([(0, 3), (40, 9), (2, 1)], "pls"),
    "later parts": ([(1, 2), (64, 64)], "ll"),
    "more than shared memory holds": ([(60000, 1), (9, 1)], "fs"),
    "everything": ([(0, 2), (60001, 1), (5, 3), (60000, 1), (8, 1)], "pflfs"),
}


def planned(step):
    sequence = np.repeat(np.arange(len(step)), [count for _, count in step]).astype(np.int32)
    places = [np.arange(start, start + count) for start, count in step]
    position = np.concatenate(places).astype(np.int32)
    width = position.max() // BLOCK + 1
    table = np.random.default_rng(2).permutation(len(step) * width).reshape(len(step), width)
    options = {"heads": HEADS, "block": BLOCK, "positions": POSITIONS, "architecture": 90}
    return plan_step(sequence, position, table.astype(np.int32), **options), table, sequence


@pytest.mark.parametrize("name", STEPS)
def test_each_sequence_has_one_way(name):
    step, kinds = STEPS[name]
    plan, table, sequence = planned(step)
    first = np.searchsorted(sequence, np.arange(len(step)))
    found = [""] * len(step)
    longest = [int(one) for one in plan.longest]
    if plan.kernel is not None:
        fresh, before, counts, padding, offsets, starts, *_ = (one.numpy() for one in plan.kernel)
        for number, (start, count) in enumerate(step):
            found[number] += "p" * bool(fresh[number, 0]) + "s" * bool(before[number, 0])
            assert fresh[number, 0] in (0, count) and before[number, 0] in (0, start)
            assert counts[number, 0] == count and starts[number] == first[number]
            assert number * POSITIONS - offsets[number] == first[number]
        assert (np.arange(len(sequence)) + padding) // POSITIONS == pytest.approx(sequence)
        assert longest == [fresh.max(), before.max()]
    for one in plan.gathered:
        tokens = one.tokens.numpy()
        for number in np.unique(sequence[tokens]):
            found[number] += "f" if one.places is None else "l"
        check_gathered(one, table, step, sequence)
    assert "".join(found) == kinds


def check_gathered(one, table, step, sequence):
    """Rows and slots of keys by a loop over positions."""
    numbers = list(dict.fromkeys(sequence[one.tokens.numpy()]))
    rows, slots, places = [], [], []
    for number in numbers:
        start, count = step[number]
        for place in range(start + count):
            block, offset = table[number, place // BLOCK], place % BLOCK
            if place >= start:
                slots.append([(block, head, offset) for head in range(HEADS)])
                places.append(len(rows) // HEADS)
            rows += [(block * HEADS + head) * BLOCK + offset for head in range(HEADS)]
    assert one.rows.numpy().tolist() == rows
    assert np.stack([axis.numpy() for axis in one.slots], -1).tolist() == np.array(slots).tolist()
    ends = np.cumsum([0, *(sum(step[number]) for number in numbers)]).tolist()
    assert one.starts_k.numpy().tolist() == ends
    assert one.longest == max(sum(step[number]) for number in numbers)
    if one.places is None:
        assert one.starts.numpy().tolist() == list(range(len(numbers) + 1))
    else:
        assert one.places.numpy().tolist() == places and one.starts.numpy().tolist() == ends


@pytest.mark.parametrize(
    ("architecture", "kib"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_scores_of_a_head_fit_shared_memory(architecture, kib):
    """As smem_size_in_bytes of Paddle's block_attn.h counts, beside a query of 128 and sums."""
    for width in (1, 5, 900):
        table = -(-width // 4) * 16 + 128 * 2 + 8 * 2 * 4
        most = longest_single(architecture, width)
        sizes = [-(-(seen + 1) // 4) * 16 + table for seen in (most, most + 64)]
        assert sizes[0] <= kib * 1024 < sizes[1]


@pytest.mark.parametrize(
    ("wanted", "prefix", "block"),
    [(None, 0, 64), (16, 0, 32), (100, 0, 128), (None, 128, 64), (None, 96, 32), (64, 7, 1)],
)
def test_blocks_are_of_a_size_that_the_kernel_takes(wanted, prefix, block):
    layout = CacheLayout(heads_first=True, block_sizes=(64, 32, 128, 1))
    assert choose_block_size(layout, wanted, prefix) == block
