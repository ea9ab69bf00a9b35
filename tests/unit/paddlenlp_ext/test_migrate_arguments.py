"""Every argument of PaddleNLP's finetuning, as the installed package declares it, is known here."""

import dataclasses

from paddlenlp.trl import DataConfig, ModelConfig, QuantConfig, SFTConfig

from common.flag_registry import Registry
from llm.config.scripts import SCRIPTS


def test_every_argument_of_paddlenlp_is_known_and_every_default_compared():
    registry = Registry(SCRIPTS["finetune_generation.py"])
    theirs = {
        f.name: f.default
        for group in (SFTConfig, DataConfig, ModelConfig, QuantConfig)
        for f in dataclasses.fields(group)
    }
    assert not sorted(set(theirs) - registry.names())
    (program,) = [p for p in registry.programs if p.name == "PaddleNLP"]
    assert {name: theirs[name] for name in program.defaults} == program.defaults
    # What is neither of the same default nor said to differ has none to compare.
    told = {"learning_rate", "max_length", "max_seq_length", "output_dir", "device", "disable_tqdm"}
    told |= {"metric_for_best_model", "report_to", "offload_optim", "decay_steps", "src_length"}
    told |= {"use_flash_attention", "use_fused_rms_norm", "neftune_noise_alpha"}
    differ = {
        name
        for name, default in theirs.items()
        if (own := registry.find(name)) is not None and own.default != default
    }
    degrees = {name for name in differ if name.endswith("_degree")}  # -1 is 1
    assert differ - degrees - told - set(program.defaults) == set()
