"""Self-check: what is built, what each device here can do, and each operator once.

python -m llama_paddle_ops; the status is 1 where an operator fails.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import llama_paddle_ops
import numpy as np
from llama_paddle_ops.checks import ALSO, CHECKS, error

_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "emulated")
# float32 throughout, against float64.
_TOLERANCE = 1e-5


def _tensor(value: Any) -> Any:
    import paddle

    if isinstance(value, np.ndarray):
        return paddle.to_tensor(value)
    if isinstance(value, list) and all(isinstance(one, np.ndarray) for one in value):
        return [paddle.to_tensor(one) for one in value]
    return value


def _run(name: str, *arguments: Any) -> list[np.ndarray]:
    import paddle

    given = [_tensor(one) for one in arguments]
    outputs = paddle._C_ops._run_custom_op(f"llama_ops_{name}", *given)
    flat = [one for out in outputs for one in (out if isinstance(out, list) else [out])]
    return [one.numpy() for one in flat]


def _about(info: dict[str, Any], supported: list[str], current: str) -> Iterator[str]:
    import paddle

    yield f"library      {llama_paddle_ops.LIBRARY}"
    yield f"compiler     {info['compiler']}"
    yield f"Paddle       {paddle.__version__}; the library was built for {info['paddle']}"
    yield f"built for    {', '.join(info['levels'])}"
    yield f"processor    {', '.join(supported)}; in use: {current}"
    archs = ", ".join(f"sm_{arch}" for arch in info["cuda"])
    yield f"GPUs         {archs + ' by ' + info['nvcc'] if archs else 'not built for any'}"
    if paddle.is_compiled_with_cuda():
        for number in range(paddle.device.cuda.device_count()):
            found = paddle.device.cuda.get_device_properties(number)
            yield f"GPU {number}        {found.name}, sm_{found.major}{found.minor}"


def _taken() -> Iterator[str]:
    """Say what each op does on each kind of device, where the suite can be imported."""
    import paddle

    if importlib.util.find_spec("external_ops") is None:
        return
    from external_ops import capability, devices

    logging.getLogger("external_ops").setLevel(logging.ERROR)  # it would say the same
    for kind in devices.kinds():
        if devices.cards(kind):
            paddle.set_device(kind)
            yield f"ops on {kind}:\n{capability.table(kind)}"
    paddle.set_device("cpu")


def _check(name: str) -> tuple[bool, str]:
    try:
        worst = error(CHECKS[name](_run))
    except (OSError, RuntimeError, ValueError) as refused:
        return False, f"FAILED: {str(refused).splitlines()[0]}"
    passed = worst <= _TOLERANCE
    return passed, f"{'ok' if passed else 'FAILED'}, error {worst:.1e}"


def main() -> int:
    """Print one line for each thing; return the exit status."""
    # Paddle sets one thread where nothing is said.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    info = llama_paddle_ops.build_info()
    import paddle

    paddle.set_device("cpu")
    if why := llama_paddle_ops.misfit():
        for line in (f"FAILED: {why}", *_taken()):
            print(line)
        return 1
    native = llama_paddle_ops.load()
    current = _LEVELS[native.llama_ops_level()]
    supported = [n for i, n in enumerate(_LEVELS) if native.llama_ops_set_level(i) == 0]
    native.llama_ops_set_level(_LEVELS.index(current))
    for line in (*_about(info, supported, current), *_taken()):
        print(line)
    failures = 0
    for name in info["ops"]:
        if name not in CHECKS:
            if ALSO.get(name) not in info["ops"]:
                failures += 1
                print(f"{name}: FAILED: there is no check for it")
            continue
        for level in supported:
            native.llama_ops_set_level(_LEVELS.index(level))
            passed, said = _check(name)
            failures += not passed
            print(f"{name:26} {level:12} {said}", flush=True)
    print(f"{failures} failures" if failures else "all operators work")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
