"""Arguments that share one model out over processes which answer together."""

import os
from dataclasses import dataclass

from llm.config.loader import arg
from llm.errors import UserError
from llm.parallel.layout import Layout
from llm.parallel.rules import launched


@dataclass
class SharingArguments:
    """How the processes of a launch share the model."""

    tensor_parallel_degree: int | None = arg(
        None,
        "processes that split every matrix; all that were launched when not given",
        minimum=-1,
        aliases=("tensor_model_parallel_size",),
    )

    def validate(self) -> None:
        """Refuse a degree that is not the number of processes.

        Raises:
            UserError: names both, and the line that launches as many.
        """
        degree, processes = self.tensor_parallel_degree or -1, launched()
        if degree not in (-1, processes):
            raise UserError(
                f"tensor_parallel_degree={degree}, but {processes} "
                f"process{'es' * (processes > 1)} were launched; start {degree} with python -m "
                f"paddle.distributed.launch --nproc_per_node {degree}, or leave the flag out"
            )

    @property
    def layout(self) -> Layout:
        """All launched processes side by side."""
        return Layout(tensor=launched())

    @property
    def rank(self) -> int:
        """The number of this process, which the launcher gave it."""
        return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


@dataclass
class PredictSharingArguments(SharingArguments):
    """How the processes of a launch share the model, or what becomes one model again."""

    merge_tensor_parallel_path: str | None = arg(
        None,
        "write the checkpoint to this new directory as complete tensors in the Hugging Face "
        "layout, and end",
    )


def check_adapted(dtype: str, device: str, adapter: str | None) -> None:
    """Refuse adapters where only packed networks can compute.

    Raises:
        UserError: names the adapter and what makes one model of both.
    """
    if adapter is not None and dtype != "float32" and device == "cpu":
        raise UserError(
            f"dtype={dtype} on CPU is for models without an adapter, not for {adapter}; merge it "
            "(merge_lora.py), or use float32"
        )


@dataclass
class PackingArguments:
    """What generation on CPU may trade for speed; needs the native ops."""

    round_activations: bool = arg(
        False,
        "W8 and W4 models round each token's inputs to 8 bits, as A8W8 and A8W4 do: faster, less "
        "exact",
    )
    head_type: str = arg(
        "model",
        "int8 rounds the output matrix and its inputs to 8 bits: faster, less exact; model leaves "
        "it as the model has it",
        choices=("model", "int8"),
    )

    @property
    def options(self) -> dict[str, bool | str]:
        """Those of ``llm.llama.packing.pack``."""
        return {"round_activations": self.round_activations, "head_type": self.head_type}
