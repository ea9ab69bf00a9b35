"""The gloo adapter: what every collective gives, forward and backward, and how mistakes end."""

import pytest


def test_collectives_equal_numpy(ranks):
    names = ranks(4, "jobs_collectives:collectives", timeout=90)
    # 3 groups × 8 types × 14 collectives, averages of 4 types, objects; a gather has one receiver.
    common = set.intersection(*map(set, names))
    assert len(common) == 3 * (8 * 14 + 4 + 2)
    assert all(len(set(found)) == len(found) for found in names)
    assert sum("gather half" in name for found in names for name in found)


def test_messages_equal_what_was_sent(ranks):
    names = ranks(4, "jobs_collectives:point_to_point", timeout=90)
    common = set.intersection(*map(set, names))
    assert len(common) == 3 * (8 * 2 + 3) + 1
    assert "partial" in names[1]


@pytest.mark.parametrize("count", [2, 4])
def test_tensor_parallel_operators_equal_dense_ones(ranks, count):
    names = ranks(count, "jobs_operators:operators", timeout=90)
    assert all(found == names[0] for found in names)
    assert {"cross_entropy backward float32", "linears backward", "concat backward"} <= set(
        names[0]
    )


@pytest.mark.parametrize(
    ("mistake", "kind", "parts"),
    [
        ("operation", "Mismatch", ["rank 1 on 127.0.0.1: broadcast from 0 float32[4]"]),
        ("size", "Mismatch", ["all_reduce SUM float32[4]", "all_reduce SUM float32[5]"]),
        ("type", "Mismatch", ["all_reduce SUM float32[4]", "all_reduce SUM int64[4]"]),
        ("reduction", "Mismatch", ["all_reduce SUM float32[4]", "all_reduce MAX float32[4]"]),
        ("label", "ValueError", ["label 12 is outside of the vocabulary 0 … 11", "-100"]),
        ("average", "ValueError", ["averages take floating point numbers, not paddle.int64"]),
    ],
)
def test_mistakes_are_messages_on_every_rank(ranks, mistake, kind, parts):
    for error, message in ranks(3, "jobs_collectives:mistakes", mistake):
        assert kind in error
        assert all(part in message for part in parts), message


def test_message_of_the_wrong_size_names_both(ranks):
    _, (error, message), _ = ranks(3, "jobs_collectives:mistakes", "message")
    assert error == "CollectiveMismatchError"
    assert "rank 0 on 127.0.0.1 sent ['send', 'paddle.float32', 4]" in message
    assert "expected ['send', 'paddle.float32', 6]" in message


def test_dead_rank_is_named_at_once(ranks):
    for error, message in ranks(3, "jobs_collectives:absent", True, timeout=20)[::2]:
        assert error == "PeerLostError"
        assert "all_reduce SUM float32[4]" in message and "rank 1 on 127.0.0.1 ended" in message


def test_late_rank_is_named_after_the_timeout(ranks):
    late = ranks(3, "jobs_collectives:absent", False, environment={"LLM_GLOO_TIMEOUT": "1"})
    for error, message in late[::2]:
        assert error == "CollectiveTimeoutError"
        assert "rank 1 on 127.0.0.1 did not arrive within 1 s" in message


def test_cpus_of_a_machine_with_gpus_talk_over_gloo_too(ranks):
    """The build of Paddle says what it could use; ``--device`` says what is used."""
    assert ranks(2, "jobs_collectives:on_a_cuda_build") == [["GLOO", 6.0]] * 2
