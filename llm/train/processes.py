"""From flags to a running parallel job: joins the processes, and arranges a network over them."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
from paddle import Tensor

from common.devices import CPU
from common.errors import UserError
from external_ops import devices
from llm.config.network import NetworkArguments
from llm.config.training import TrainArguments
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.pipeline import LlamaPieces, mark_stage_shared
from llm.parallel import topology as topologies
from llm.parallel.context import context_attention, cut
from llm.parallel.overlap import Overlap
from llm.parallel.pipeline import Pipeline
from llm.parallel.rules import parse_options
from llm.parallel.topology import Topology
from llm.planner import Prediction, needs_offload
from llm.train.checks import machine_bytes
from llm.train.preference import sequence_log_probs


def join(run: TrainArguments) -> Topology:
    """Start what ties the processes of a job together; paddle is loaded on the right device.

    Raises:
        UserError: another number of processes than the flags take.
    """
    return topologies.start(run.layout, run.device)


def network_options(network: NetworkArguments, run: TrainArguments) -> dict[str, Any]:
    """Return what flags say about a network, for ``llm.llama.build``.

    Weights have their final type from the start: what is computed before training, such as the
    reference's scores of pairs, runs on the kernels of that type, and memory never holds more.
    """
    return {
        "dtype": run.weight_type,
        "use_flash_attention": network.use_flash_attention,
        "use_fused_rms_norm": network.use_fused_rms_norm,
        "use_fused_head_and_loss_fn": network.use_fused_head_and_loss_fn,
        "ops": network.op_modes,
        "fp8": run.fp8,
        "recompute": run.recompute
        and {
            "granularity": run.recompute_granularity,
            "num_layers": run.recompute_num_layers,
            "offload": run.recompute_offload,
        },
    }


def answer_scorer(
    model: LlamaForCausalLM, topology: Topology
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return how log-probabilities of answers are computed over stages; None without a pipeline.

    Making a pipeline is a collective call.
    """
    if topology.layout.pipeline == 1:
        return None
    pipeline = Pipeline(LlamaPieces(model), topology)

    def score(ids: Tensor, labels: Tensor) -> Tensor:
        def log_probs(view: Any, batch: dict[str, Tensor]) -> Any:
            return sequence_log_probs(view, batch["input_ids"], batch["labels"]).numpy()

        return paddle.to_tensor(pipeline.apply(log_probs, {"input_ids": ids, "labels": labels}))

    return score


def arrange(
    model: LlamaForCausalLM,
    topology: Topology,
    run: TrainArguments,
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Return the fields of a trainer's task that say how a network runs over the processes.

    Making a pipeline is a collective call.

    Args:
        model: this process's part of the network, with its adapters.
        topology: the running job.
        run: the flags.
        prediction: of memory, which decides about ``--offload_optim auto``.
    """
    fields: dict[str, Any] = {"topology": topology, "prediction": prediction}
    if prediction is not None:
        room = device_bytes(run.device) if run.offload_mode == "auto" else math.inf
        fields["offload"] = needs_offload(run.offload_mode, prediction, room)
    if topology.layout.context > 1:
        model.seams.attention = context_attention(model.seams.attention, topology)
        fields["cut"] = partial(cut, topology=topology)
    if topology.layout.pipeline > 1:
        mark_stage_shared(model)
        options, _ = parse_options(run.pipeline_parallel_config)
        fields["pipeline"] = Pipeline(LlamaPieces(model), topology, options)
    if run.overlap_communication:
        fields["overlap"] = Overlap(run.gradient_accumulation_steps)
    if topology.layout.sharding > 1:
        fields["units"] = list(model.model.layers)
    return fields


def device_bytes(device: str) -> int:
    """Return the memory that a process may use: of its device, or its share of the machine's.

    Raises:
        UserError: a device that does not tell how much it has.
    """
    if device == CPU:
        return machine_bytes() // int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
    found = devices.memory()
    if found is None:
        raise UserError(
            f"offload_optim=auto: the device {device} does not tell how much memory it has; choose "
            "off or static"
        )
    return found
