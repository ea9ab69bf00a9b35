"""--ops: which kernel runs each op."""

import pytest

from common.errors import UserError
from common.flags import load
from llm.config.machine import KernelArguments, parse_ops
from llm.config.network import ModelArguments
from llm.config.scripts import SCRIPTS

NEEDED = {
    "run_pretrain.py": ["--do_eval", "true"],
    "finetune_generation.py": ["--do_eval", "true", "--task_name", "squad"],
    "evaluate_generation.py": ["--task", "perplexity", "--data_file", "x"],
}
WITH_OPS = [name for name, groups in SCRIPTS.items() if issubclass(groups[0], KernelArguments)]


@pytest.mark.parametrize(
    ("words", "modes"),
    [
        ([], {}),
        (["fused"], {"others": "fused"}),
        (["rms_norm=fused", "swiglu=auto"], {"rms_norm": "fused", "swiglu": "auto"}),
        (["reference,rotary=auto"], {"others": "reference", "rotary": "auto"}),
    ],
)
def test_words(words, modes):
    assert parse_ops(words) == modes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fuse"], "'fuse' asks for 'fuse', .* auto, fused, reference; did you mean 'fused'"),
        (["rmsnorm=auto"], "unknown op 'rmsnorm'; there are .*; did you mean 'rms_norm'"),
        (["swiglu=referense"], "asks for 'referense', .*; did you mean 'reference'"),
        (["swiglu=auto", "swiglu=fused"], "swiglu is given twice, as auto and as fused"),
        (["auto", "fused"], "others is given twice"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        parse_ops(words)


@pytest.mark.parametrize("script", WITH_OPS)
def test_scripts_take_the_flag_and_check_it_first(script, tmp_path):
    argv = ["--model_name_or_path", "x", "--ops", "fused", "causal_attention=reference"]
    rest = NEEDED.get(script, [])
    found = load(SCRIPTS[script], [*argv, *rest], prog=script)[0]
    assert isinstance(found, KernelArguments)
    assert found.op_modes == {"others": "fused", "causal_attention": "reference"}
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: x\nops: [rms_norm=reference]\n", "utf-8")
    found = load(SCRIPTS[script], [str(file), *rest], prog=script)[0]
    assert found.op_modes == {"rms_norm": "reference"}
    with pytest.raises(UserError, match="did you mean 'causal_attention'"):
        load(SCRIPTS[script], [*argv[:3], "causal_atention=auto"], prog=script)


def test_the_flag_goes_before_the_switches():
    network = ModelArguments(
        use_flash_attention=True, use_fused_rms_norm=False, ops=["causal_attention=reference"]
    )
    assert not network.takes("causal_attention") and not network.takes("rms_norm")
    assert network.takes("swiglu")
    network = ModelArguments(use_fused_rms_norm=True, ops=["auto,rms_norm=reference"])
    assert network.takes("causal_attention") and not network.takes("rms_norm")


def test_switches_that_are_not_given_are_on_but_for_the_one_that_costs_time():
    words = ["--do_eval", "true"]
    network = load(SCRIPTS["run_pretrain.py"], words, prog="train")[0]
    assert network.takes("causal_attention") and network.takes("rms_norm")
    assert network.takes("add_rms_norm") and not network.takes("cross_entropy")
    words += ["--use_flash_attention", "0", "--use_fused_rms_norm", "false"]
    words += ["--use_fused_head_and_loss_fn", "1"]
    network = load(SCRIPTS["run_pretrain.py"], words, prog="train")[0]
    assert not network.takes("causal_attention") and not network.takes("rms_norm")
    assert not network.takes("add_rms_norm") and network.takes("cross_entropy")
