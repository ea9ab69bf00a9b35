"""The words of --pipeline_parallel_config, and what an interleaved schedule asks for."""

import pytest

from common.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.rules import PipelineOptions, check_chunks, check_micro_batches, parse_options

CHUNKS = Layout(pipeline=4, virtual_pipeline=2)


def test_words_set_fields():
    words = "disable_partial_send_recv, enable_overlap_p2p_comm  disable_batch_p2p_comm"
    options, messages = parse_options(words)
    assert options == PipelineOptions(partial_send=False, overlap=True, batched=False)
    assert not messages
    assert parse_options("best_unbalanced_scheduler")[0].unbalanced
    assert parse_options("") == (PipelineOptions(), [])


def test_words_without_effect_are_explained():
    options, messages = parse_options("disable_p2p_cache_shape enable_delay_scale_loss")
    assert options == PipelineOptions()
    assert "disable_p2p_cache_shape changes nothing: rows of any length" in messages[0]
    assert "enable_delay_scale_loss changes nothing: losses are sums" in messages[1]


def test_every_word_of_paddlenlp_is_known():
    """Those that paddlenlp/trainer/training_args.py accepts."""
    words = [
        *("disable_p2p_cache_shape", "disable_partial_send_recv", "enable_delay_scale_loss"),
        *("enable_dp_comm_overlap", "enable_sharding_comm_overlap", "enable_timer"),
        *("enable_release_grads", "enable_clear_every_step_cache", "enable_overlap_p2p_comm"),
        *("disable_batch_p2p_comm", "best_unbalanced_scheduler"),
    ]
    for word in words:
        options, messages = parse_options(word)
        assert messages or options != PipelineOptions(), word


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("disable_p2p_cache_shapes", "did you mean 'disable_p2p_cache_shape'"),
        ("enable_partial_send_recv", "did you mean 'disable_partial_send_recv'"),
        ("fast", "'fast' is unknown; known are best_unbalanced_scheduler, "),
        ("use_dualpipev", "it is not supported; use --virtual_pp_degree"),
    ],
)
def test_unknown_words_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        parse_options(words)


def test_too_few_micro_batches_are_refused():
    check_micro_batches(Layout(pipeline=4), 1, PipelineOptions())
    check_micro_batches(CHUNKS, 4, PipelineOptions())
    with pytest.raises(UserError, match=r"interleaved schedule of 4 stages needs 4 .* not 3"):
        check_micro_batches(CHUNKS, 3, PipelineOptions())
    with pytest.raises(UserError, match="set gradient_accumulation_steps=8"):
        check_micro_batches(CHUNKS, 7, PipelineOptions(unbalanced=True))


def test_chunks_of_two_stages_are_refused():
    check_chunks(CHUNKS)
    check_chunks(Layout(pipeline=2))
    with pytest.raises(UserError, match="virtual_pp_degree=2 needs 3 stages or more, there are 2"):
        check_chunks(Layout(pipeline=2, virtual_pipeline=2))
