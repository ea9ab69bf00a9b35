"""The device a run computes on; imports paddle, but not yet the slower paddlenlp."""

import paddle

from llm.config.schema import PretrainArguments
from llm.errors import UserError


def select_device(run: PretrainArguments) -> None:
    """Make the requested device paddle's current one.

    Raises:
        UserError: the installed paddle, or the GPU, cannot do what is asked.
    """
    if run.device == "gpu":
        if not paddle.device.is_compiled_with_cuda():
            raise UserError(
                f"device=gpu, but the installed paddle {paddle.__version__} is the CPU wheel; "
                "install paddlepaddle-gpu from Paddle's own package index (README, version "
                "matrix) or use --device cpu"
            )
        if paddle.device.cuda.device_count() == 0:
            raise UserError("device=gpu, but paddle sees no GPU; check nvidia-smi and the driver")
        if run.bf16 and not paddle.amp.is_bfloat16_supported():
            name = paddle.device.cuda.get_device_name()
            raise UserError(f"bf16 needs an Ampere GPU or newer, not {name}; use --fp16")
    paddle.set_device(run.device)
