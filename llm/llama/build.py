"""From a configuration to a ready network: the one place that knows the order of steps."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from common.errors import UserError
from common.gguf import gguf_file
from external_ops import devices, native
from external_ops.backend import Ops, select_ops
from external_ops.modes import Modes, merged, modes_of_flags
from llm.config.precision import Work, check_precision
from llm.llama.config import TINY_NAME, LlamaConfig, load_config
from llm.llama.files import weights
from llm.llama.files.checkpoint import check_tensors
from llm.llama.files.dtypes import FLOATS, TYPES, dtype_name
from llm.llama.files.rank_files import is_rank_directory
from llm.llama.files.spare import settle
from llm.llama.fp8 import check_device, use_fp8
from llm.llama.frozen import freeze
from llm.llama.layers import name_parameters
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.placement import style
from llm.llama.places import check_place
from llm.llama.quant_config import QuantConfig, load_quantization
from llm.llama.quantization.network import (
    install,
    quantization_of,
    quantize_model,
    read_floats,
)
from llm.llama.quantization.shares import install_shares
from llm.llama.recompute import recompute_layers
from llm.parallel.pieces import share, split_axis, whole_shape
from llm.parallel.rules import check_frozen
from llm.parallel.topology import Topology, single

_log = logging.getLogger(__name__)


def _check_dtype(dtype: str, ops: Ops, to_pack: bool) -> None:
    missing = "" if ops.decoder else native.reason() or "--ops asks for the reference"
    work: Work = "inference" if to_pack else "training"
    check_precision(work, dtype, devices.current(), missing=missing)


def _select_ops(modes: Modes) -> Ops:
    try:
        return select_ops(modes)
    except ValueError as error:
        raise UserError(str(error)) from error


def build_model(
    config: LlamaConfig,
    *,
    seed: int | None = None,
    dtype: str = "float32",
    use_flash_attention: bool | None = None,
    use_fused_rms_norm: bool | None = None,
    use_fused_head_and_loss_fn: bool = False,
    ops: Modes | None = None,
    recompute: bool | Mapping[str, Any] = False,
    random: bool = True,
    quantization: QuantConfig | None = None,
    to_pack: bool = False,
    fp8: bool = False,
    frozen: bool = False,
    topology: Topology | None = None,
) -> LlamaForCausalLM:
    """Build a network with random weights, or this process's part of one.

    Each weight is drawn from a generator of its own, which the seed and the weight's name make, so
    that it does not depend on the layout.

    Args:
        config: the architecture.
        seed: of the weights, and of Paddle's generator afterwards; None draws one from that.
        dtype: of the parameters.
        use_flash_attention: False takes the reference; None is True.
        use_fused_rms_norm: False takes the reference; None is True.
        use_fused_head_and_loss_fn: losses without all logits in memory.
        ops: how to choose kernels, by op (:func:`external_ops.backend.select_ops`); goes before the
            three above.
        recompute: decoder layers keep no activations for the backward pass; or the options of
            :func:`llm.llama.recompute.recompute_layers`.
        random: draw weights; otherwise they are zeros, to be filled from a checkpoint.
        quantization: linears get integer weights of zeros, to be filled from a checkpoint.
        to_pack: the caller will pack it for generation (:mod:`llm.llama.fused`), which is how
            CPUs multiply with bfloat16 weights.
        fp8: decoder layers multiply in float8, for training (:mod:`llm.llama.fp8`).
        frozen: no weight will train; in bfloat16 they only lie, and the network computes in float32
            (:mod:`llm.llama.frozen`).
        topology: the running job, of whose network this process holds a part; no more than that,
            and one whole tensor at a time, is ever in memory. None is a job of one process.

    Raises:
        UserError: a type that the device cannot compute in, fp8 included, groups that do not fit,
            integer weights that tensor parallelism does not split, in training none, or a fused op
            that the device lacks.
    """
    lies_in_half = frozen and dtype == "bfloat16"
    # The other form of the loss would widen the whole output matrix.
    fused_loss = use_fused_head_and_loss_fn or lies_in_half
    flags = modes_of_flags(use_flash_attention, use_fused_rms_norm, fused_loss)
    kernels = _select_ops(merged(flags, ops or {}))
    if fp8:
        check_device()
    topology = topology or single()
    if lies_in_half:
        check_frozen(topology.layout)
    else:
        _check_dtype(dtype, kernels, to_pack)
    if quantization is not None and topology.layout.tensor > 1 and not to_pack:
        raise UserError(
            f"tensor_parallel_degree={topology.layout.tensor} does not split integer weights; use "
            "1, or widen them first (quantize_generation.py)"
        )
    if seed is not None:
        paddle.seed(seed)
    with _default_dtype(dtype):
        model = _without_values(config, kernels, quantization, topology, lies_in_half)
        for parameter in model.parameters():
            parameter.initialize()
    if fp8:
        use_fp8(model)
    name_parameters(model)
    if random:
        _draw(model, config.initializer_range, topology)
    if recompute:
        recompute_layers(model, **({} if recompute is True else recompute))
    return model


@contextlib.contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    default = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(default)


def build_empty(config: LlamaConfig, *, dtype: str, ops: Modes | None = None) -> LlamaForCausalLM:
    """Build a network for generation whose parameters take no memory: somebody else has values.

    Args:
        config: the architecture.
        dtype: of the parameters.
        ops: how to choose kernels, by op.

    Raises:
        UserError: see :func:`build_model`.
    """
    kernels = _select_ops(merged(modes_of_flags(None, None, True), ops or {}))
    _check_dtype(dtype, kernels, True)
    with _default_dtype(dtype):
        return _without_values(config, kernels, None, single(), False)


def _without_values(
    config: LlamaConfig,
    ops: Ops,
    quantization: QuantConfig | None,
    topology: Topology,
    lies_in_half: bool,
) -> LlamaForCausalLM:
    """Return this process's part of a network; its parameters take no memory yet."""
    layout, stage = topology.layout, None
    if layout.pipeline > 1:
        stage = layout.stages(config.num_hidden_layers)[topology.at.pipeline]
    with paddle.LazyGuard():
        model = LlamaForCausalLM(config, ops, nn.initializer.Constant(0.0), stage)
        if quantization is not None and layout.tensor == 1:
            install(model, quantization)
        if lies_in_half:
            freeze(model)
        if layout.tensor > 1:
            from llm.parallel import tensor

            shard = tensor.vocabulary_shard(topology, config.vocab_size)
            if quantization is not None:
                install_shares(model, quantization, topology, shard.total, style)
            tensor.split_network(model, topology, style, heads=("lm_head",), last=model.model.norm)
            model.seams.shard = shard
            model.seams.own_heads = tensor.own_heads(topology)
    return model


def _draw(model: LlamaForCausalLM, deviation: float, topology: Topology) -> None:
    """Draw every matrix from a normal distribution, each from its own generator."""
    seed = int(paddle.randint(0, 2**31 - 1, [1]))
    state = paddle.get_rng_state()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            paddle.seed(int.from_bytes(digest[:4], "big"))
            axis = split_axis(parameter)
            shape = whole_shape(parameter.shape, axis, topology)
            whole = paddle.randn(shape, dtype="float32").scale_(deviation)
            own = whole[share(shape, axis, topology)] if axis is not None else whole
            parameter.set_value(own.astype(parameter.dtype))
    paddle.set_rng_state(state)


def load_model(
    path: str | Path,
    *,
    topology: Topology | None = None,
    round_to: QuantConfig | None = None,
    **options: Any,
) -> LlamaForCausalLM:
    """Build a network, or this process's part of one, and fill it from a model directory.

    Args:
        path: directory in Hugging Face's layout with config.json and safetensors, or with
            PaddleNLP's files of any parallel ranks; a GGUF file; or the name of the built-in random
            model, whose weights are drawn from a fixed seed.
        topology: the running job; None is a job of one process.
        round_to: linears are rounded to the nearest integers while they are read, one at a time.
        options: those of :func:`build_model`.

    Raises:
        UserError: a missing, damaged or foreign checkpoint, or one to round that holds integers.
    """
    if str(path) == TINY_NAME:
        model = build_model(load_config(TINY_NAME), seed=0, topology=topology, **options)
        return model if round_to is None else quantize_model(model, round_to)
    path = Path(path)
    config, quantization, _ = look(path)  # fail before memory is taken
    if quantization is not None and round_to is not None:
        raise UserError(
            f"{path} holds integers already ({quantization.kind}); leave out weight_quantize_algo"
        )
    if is_rank_directory(path) and (topology is None or topology.rank == 0):
        _log.warning(
            "%s holds PaddleNLP's files of parallel ranks: their pieces are put together in memory "
            "(convert_checkpoint.py does that once and for all)",
            path,
        )
    # Random numbers for billions of weights that are about to be replaced would take minutes.
    options |= {"random": False, "quantization": quantization or round_to, "topology": topology}
    model = build_model(config, **options)
    if round_to is not None:
        read_floats(model)
    weights.load_weights(model, path, tied=config.tie_word_embeddings, topology=topology)
    return model


def look(path: Path) -> tuple[LlamaConfig, QuantConfig | None, Mapping[str, Any]]:
    """Return what a model directory holds: architecture, quantization and stored tensors by name.

    Raises:
        UserError: a missing, damaged or foreign checkpoint.
    """
    if gguf_file(path) is None:
        check_place(path)
    config, quantization = load_config(path), load_quantization(path)
    tensors = weights.find_tensors(path, FLOATS if quantization is None else TYPES)
    config = settle(path, config, tensors)
    if quantization is None:
        check_tensors(path, config, tensors)
    return config, quantization, tensors


def save_model(model: LlamaForCausalLM, directory: str | Path, **options: Any) -> None:
    """Write weights, config.json and generation_config.json in Hugging Face's layout.

    Args:
        model: any network of :func:`build_model`.
        directory: created when absent; files replace their predecessors atomically.
        options: those of :func:`llm.llama.files.weights.save_weights`.

    Raises:
        UserError: a network with an adapter, whose own layout is another.
        OSError: a full or unwritable disk; what was in the directory is unchanged.
    """
    if any(".lora_A" in n or n.startswith("prefix.") for n, _ in model.named_parameters()):
        raise UserError(
            "the model has an adapter: save that with save_lora or save_prefix, or merge it first"
        )
    config = model.config
    first = next(iter(model.model.layers))  # a stage may have no embedding
    dtype = dtype_name(first.input_layernorm.weight)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_for_json,
        "pad_token_id": config.pad_token_id,
    }
    described = config.to_hf(dtype)
    quantization = quantization_of(model)
    if quantization is not None:
        described["quantization_config"] = quantization.to_hf()
    documents = {"generation_config.json": generation, "config.json": described}
    weights.save_weights(model, directory, documents=documents, **options)
