"""What runs in the peers' environment: Megatron-Core's own GPT model, written, read and run.

``python -m tests.parity.megatron_side write DIR`` saves a checkpoint (``torch_dist``) of each case
of ``DIR/cases.json`` with the logits of its model; ``read DIR`` loads the ranks that the suite made
of each, and writes the logits of that. Nothing of the suite is imported.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
}
VOCABULARY, CONTEXT = 96, 64
# Where Transformer Engine, whose names the suite writes, has the norms.
ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def on_cpu() -> None:
    """Start one process without a GPU, which Megatron-Core asks for in places."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda._lazy_init = lambda: None
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    from megatron.core import parallel_state, tensor_parallel

    class NoStates:
        def fork(self) -> Any:
            return contextlib.nullcontext()

    tensor_parallel.get_cuda_rng_tracker = NoStates  # of dropout, of which there is none
    parallel_state.initialize_model_parallel()


def model_of(tied: bool) -> Any:
    """Return a Llama of Megatron-Core's parts."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    unfused = ("bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion")
    config = TransformerConfig(
        **SIZES,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **dict.fromkeys(unfused, False),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=CONTEXT,
        position_embedding_type="rope",
        rotary_base=10000,
        share_embeddings_and_output_weights=tied,
    ).eval()


def write_logits(model: Any, ids: list[int], place: Path) -> None:
    """Write what a model says of ids, ``[1, S, V]``."""
    length = len(ids)
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), torch.arange(length)[None], hidden)
    (place / "logits.json").write_text(json.dumps(logits.tolist()))


def write(root: Path) -> None:
    """Save every case as Megatron does by default, and what its model says."""
    from megatron.core import dist_checkpointing

    given = json.loads((root / "cases.json").read_text())
    for name, tied in given["tied"].items():
        torch.manual_seed(len(name))
        model, place = model_of(tied), root / name / "iter_0000003"
        place.mkdir(parents=True)
        for key, values in model.named_parameters():
            if "norm" in key:
                torch.nn.init.normal_(values, 1.0, 0.2)
        settings = argparse.Namespace(
            **SIZES,
            group_query_attention=True,
            padded_vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            norm_epsilon=1e-5,
            untie_embeddings_and_output_weights=not tied,
            normalization="RMSNorm",
            swiglu=True,
            position_embedding_type="rope",
            rotary_base=10000,
            add_bias_linear=False,
        )
        state = model.sharded_state_dict(prefix="model.") | {"args": settings, "iteration": 3}
        dist_checkpointing.save(state, str(place))
        (place.parent / "latest_checkpointed_iteration.txt").write_text("3")
        write_logits(model, given["ids"], place.parent)


def read(root: Path) -> None:
    """Load the file of one rank of every case, and write what that model says."""
    given = json.loads((root / "cases.json").read_text())
    for name, tied in given["tied"].items():
        (file,) = (root / name).glob("*/mp_rank_00/model_optim_rng.pt")
        content = torch.load(file, weights_only=False)  # it holds settings, as Megatron's do
        state = {}
        for key, values in content["model"].items():
            theirs = next((end for end in ENGINE if key.endswith(end)), "")
            state[key.removesuffix(theirs) + ENGINE.get(theirs, "")] = values
        model = model_of(tied)
        found = model.load_state_dict(state, strict=False)
        missing = [key for key in found.missing_keys if not key.endswith("_extra_state")]
        assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
        write_logits(model, given["ids"], root / name)


if __name__ == "__main__":
    on_cpu()
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
