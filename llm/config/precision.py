"""Which type of numbers a script computes in on which device: one rule for all of them.

| work | CPU | GPU and other devices |
|---|---|---|
| inference: prediction, serving, evaluation, export | float32; bfloat16 with the native ops | all |
| training | float32 | all |

Everything else is refused, by :func:`check_precision`. Finetuning alone goes on in float32 and says
so, since published command lines carry ``--bf16`` or ``--fp16``.
"""

from typing import Any, Literal

from common.devices import CPU
from common.errors import UserError
from common.flags import arg

Work = Literal["inference", "training"]

# The flag takes PaddleNLP's and Accelerate's short names too.
SPELLINGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = tuple(SPELLINGS.values())


def dtype_arg(default: str | None, help: str, not_with: str | tuple[str, ...] = ()) -> Any:
    """Declare a flag whose value is one of :data:`DTYPES`, however it was spelled."""
    return arg(default, help, choices=DTYPES, spellings=SPELLINGS, not_with=not_with)


def refusal(work: Work, dtype: str, device: str, *, missing: str = "") -> str:
    """Return why work cannot be done in a type, or an empty string.

    Args:
        work: ``inference``, or ``training``: what runs on Paddle's own operators.
        dtype: one of :data:`DTYPES`.
        device: its kind, such as ``cpu`` or ``gpu``. What a device other than these lacks is known
            when Paddle has been loaded on it (``llm.runtime.load_paddle``).
        missing: why the native ops do not run; empty where they do, or where that is not known yet
            and will be asked again.
    """
    assert ":" not in device, device
    if dtype == "float32" or device != CPU:
        return ""
    if work == "training":
        short = next(name for name, long in SPELLINGS.items() if long == dtype)
        return f"Paddle has no {short} kernels on CPU"
    return missing if dtype == "bfloat16" else "a CPU computes in float32 or bfloat16"


def check_precision(
    work: Work, dtype: str, device: str, *, flag: str | None = None, missing: str = ""
) -> None:
    """Refuse a type in which work cannot be done; arguments are those of :func:`refusal`.

    Args:
        flag: what asked for the type, if it was not ``--dtype``.

    Raises:
        UserError: an unknown type, or the reason.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if why := refusal(work, dtype, device, missing=missing):
        needs = "the native ops, or a GPU" if why == missing else "a GPU"
        asked, fix = (flag, f"drop --{flag}") if flag else (f"dtype={dtype}", "use float32")
        raise UserError(f"{asked} needs {needs}: {why}; or {fix}")
