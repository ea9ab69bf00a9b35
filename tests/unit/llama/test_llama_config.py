"""Presets, Hugging Face's spellings, and what is refused."""

import json

import pytest

from common.errors import UserError
from llm.llama.build import build_model
from llm.llama.config import PRESETS, LlamaConfig, RopeScaling, load_config, preset_name
from tests.unit.llama.files.checkpoint_files import CONFIG

# Billions, as the papers and model cards print them.
PUBLISHED = {
    "llama-7b": 6.74,
    "llama-13b": 13.02,
    "llama-65b": 65.29,
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "tinyllama-1.1b": 1.10,
    "smollm2-135m": 0.13,
    "smollm2-360m": 0.36,
    "smollm2-1.7b": 1.71,
    "yi-6b": 6.06,
    "yi-34b": 34.39,
    "yi-1.5-6b": 6.06,
    "yi-1.5-9b": 8.83,
    "yi-1.5-34b": 34.39,
    "chinese-llama-2-7b": 6.93,
    "chinese-alpaca-2-13b": 13.25,
    "ziya-llama-13b": 13.09,
}
# Of the config.json that stands beside each preset: vocab_size, hidden_size, intermediate_size,
# num_hidden_layers, num_attention_heads, num_key_value_heads, max_position_embeddings.
NOT_META = {
    "tinyllama-1.1b": (32000, 2048, 5632, 22, 32, 4, 2048),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 8192),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, 8192),
    "smollm2-1.7b": (49152, 2048, 8192, 24, 32, 32, 8192),
    "yi-6b": (64000, 4096, 11008, 32, 32, 4, 4096),
    "yi-34b": (64000, 7168, 20480, 60, 56, 8, 4096),
    "yi-1.5-6b": (64000, 4096, 11008, 32, 32, 4, 4096),
    "yi-1.5-9b": (64000, 4096, 11008, 48, 32, 4, 4096),
    "yi-1.5-34b": (64000, 7168, 20480, 60, 56, 8, 4096),
    "chinese-llama-2-7b": (55296, 4096, 11008, 32, 32, 32, 4096),
    "chinese-alpaca-2-13b": (55296, 5120, 13824, 40, 40, 40, 4096),
    "ziya-llama-13b": (39424, 5120, 13824, 40, 40, 40, 2048),
}
SMALL = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, "rope_theta": 100000}
OTHERS = {
    "tinyllama": {},
    "smollm2-135m": SMALL | {"initializer_range": 0.041666666666666664},
    "smollm2-360m": SMALL,
    "smollm2-1.7b": SMALL | {"rope_theta": 130000},
    "yi-1.5": {"rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "pad_token_id": 0},
    "yi": {"rope_theta": 5000000.0, "pad_token_id": 0},
    "chinese": {"pad_token_id": 0},
    "ziya": {"rms_norm_eps": 1e-6, "pad_token_id": 0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    assert round(PRESETS[name].num_parameters / 1e9, 2) == PUBLISHED[name]


def test_every_full_size_preset_is_checked():
    small = {n for n, c in PRESETS.items() if c.num_parameters < 1e8}
    assert PRESETS.keys() - small == PUBLISHED.keys()


@pytest.mark.parametrize("name", NOT_META)
def test_shapes_of_others_are_those_of_their_config_json(name):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    other = next(value for prefix, value in OTHERS.items() if name.startswith(prefix))
    raw = {"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    raw |= dict(zip(names, NOT_META[name], strict=True)) | other
    assert LlamaConfig.from_hf(raw) == PRESETS[name]


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("name", ["tiny-random-llama", "tiny-llama-2", "tiny-llama-3.2"])
def test_counted_parameters_are_those_of_the_network(name, changes):
    config = PRESETS[name].replace(**changes)
    model = build_model(config)
    assert config.num_parameters == sum(p.size for p in model.parameters())


def test_flops_count_every_product_once():
    """Six operations per weight of each matrix product, and the two of attention in full."""
    config = PRESETS["llama-2-70b"]
    per_layer = 8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28672
    products = 80 * per_layer + 8192 * 32000
    attention = 80 * 2 * 2 * 8192 * 4096 * 3
    assert config.flops_per_token(4096) == pytest.approx(6 * products + attention, rel=1e-4)
    tied = PRESETS["llama-3.2-1b"]
    untied = tied.replace(tie_word_embeddings=False)
    assert tied.flops_per_token(128) == untied.flops_per_token(128)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 5e5, **LLAMA3}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5}},
            {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.5},
        ),
    ],
    ids=["default", "llama3", "linear", "dynamic"],
)
def test_both_spellings_of_rope(old, new):
    bare = {k: v for k, v in CONFIG.items() if k != "rope_theta"}
    one, two = LlamaConfig.from_hf(bare | old), LlamaConfig.from_hf(bare | {"rope_parameters": new})
    assert one == two
    assert one.rope_scaling.rope_type == new["rope_type"]
    assert one.rope_theta == new["rope_theta"]
    assert one.rope_scaling.factor == new.get("factor", 1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_written_config_reads_back(name):
    config = PRESETS[name]
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults_are_those_of_transformers():
    bare = {
        key: CONFIG[key]
        for key in CONFIG
        if key not in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    }
    config = LlamaConfig.from_hf(bare | {"head_dim": None})
    assert config.num_key_value_heads == 4 and config.head_dim == 4
    assert config.rms_norm_eps == 1e-6 and config.rope_theta == 10000.0
    assert config.bos_token_id == 1 and config.eos_token_id == (2,)
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, (2,)),
        ([5, 6], None, (5, 6)),
        (None, None, ()),
        (128001, [128001, 128008, 128009], (128001, 128008, 128009)),
        (7, 8, (8,)),
    ],
)
def test_end_of_sequence_ids(tmp_path, in_config, in_generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": in_config}))
    if in_generation is not None:
        content = json.dumps({"eos_token_id": in_generation})
        (tmp_path / "generation_config.json").write_text(content)
    assert load_config(tmp_path).eos_token_id == expected


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("facebook/llama-7b", "llama-7b"),
        ("meta-llama/Meta-Llama-3-70B", "llama-3-70b"),
        ("__internal_testing__/tiny-random-llama", "tiny-random-llama"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama-3.1-8b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.1-70b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tinyllama-1.1b"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b"),
        ("HuggingFaceTB/SmolLM-135M", None),  # of the first generation: another theta and length
        ("01-ai/Yi-34B-Chat", "yi-34b"),
        ("01-ai/Yi-1.5-9B-Chat", "yi-1.5-9b"),
        ("01-ai/Yi-6B-200K", None),
        ("hfl/chinese-alpaca-2-7b", "chinese-llama-2-7b"),
        ("hfl/chinese-llama-2-7b-64k", None),
        ("linly-ai/chinese-llama-2-7b", None),  # another vocabulary under the same name
        ("chinese-llama-2-7b", "chinese-llama-2-7b"),
        ("IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1", "ziya-llama-13b"),
        ("IDEA-CCNL/Ziya-LLaMA-13B-v1.1", "ziya-llama-13b"),
        ("llama-9000b", None),
        ("mistral-7b", None),
    ],
)
def test_published_names(name, preset):
    assert preset_name(name) == preset


REFUSED = [
    ({"model_type": "mistral"}, "model_type='mistral' is not llama"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'; Llama's feed-forward uses silu"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"weights are quantized \(gptq\)"),
    ({"quantization_config": "awq"}, r"weights are quantized \(awq\)"),
    ({"vocab_size": ...}, "missing vocab_size"),
    ({"num_hidden_layers": ..., "hidden_size": ...}, "missing hidden_size, num_hidden_layers"),
    ({"hidden_size": "16"}, "hidden_size='16' has to be a positive whole number"),
    ({"hidden_size": 16.5}, "hidden_size=16.5 has to be"),
    ({"vocab_size": True}, "vocab_size=True has to be"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 has to be"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 has to be"),
    ({"num_attention_heads": "4"}, "num_attention_heads='4' has to be"),
    ({"head_dim": -8}, "head_dim=-8 has to be"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads"),
    ({"hidden_size": 18}, "hidden_size=18 is not a multiple of num_attention_heads=4"),
    ({"head_dim": 5}, "head_dim=5 has to be even"),
    ({"num_hidden_layers": 10**8}, "num_hidden_layers=100000000 is more than 4096"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0 has to be a positive number"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps='tiny' has to be a positive number"),
    ({"rope_theta": "10k"}, "rope_theta='10k' has to be a positive number"),
    ({"rope_theta": float("nan")}, "rope_theta=nan has to be a positive number"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' has to be true or false"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id=.* has to hold token ids"),
    ({"bos_token_id": [1, 2]}, "bos_token_id=.* has to be one token id"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; Llama models rotate whole heads"),
    ({"rope_scaling": "linear"}, "rope settings 'linear' are not a mapping"),
    ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope type 'mrope' is not one of default"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope type 'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5 has to be at least 1"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope type 'llama3' needs high_freq_factor, low_freq_factor, original_max_position",
    ),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 has to exceed"),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8k"}},
        "original_max_position_embeddings='8k' has to be a positive whole number",
    ),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_bad_settings_are_named(changes, message):
    raw = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    with pytest.raises(UserError, match=message):
        LlamaConfig.from_hf(raw)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"neither a directory nor .* nearest .*'llama-3.1-8b'"):
        load_config("llama-3.1-8bb")


def test_rope_scaling_on_its_own():
    with pytest.raises(UserError, match="rope type 'su', with factors of its own"):
        RopeScaling("su")
