"""Sampling on the rehearsal device beside the host's, and reads of a decoding step."""

import dataclasses
import importlib
import sys
from typing import Any

import numpy as np
import paddle

from external_ops import tensors
from llm.engine import device_sampler
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.engine.sampler import Outcome, sample_rows
from llm.engine.sequence import Row, Sequence
from llm.llama.build import build_model
from llm.llama.fused import pack
from tests.device.jobs_blocks import network

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_k": 1},
    {"top_k": 100000},
    {"top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.5, "top_k": 50},
    {"top_p": 1e-6},
    {"top_p": 0.95, "repetition_penalty": 0.8},
    {"min_p": 0.05},
    {"min_p": 0.01, "top_k": 40, "top_p": 0.97, "temperature": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3},
    {"temperature": 0, "frequency_penalty": 1.1, "repetition_penalty": 1.2},
    {"logit_bias": ((5, 3.3), (9, -100.0), (700, 6.1)), "bad_words": ((123,), (5, 700))},
    {"typical_p": 0.8},
    {"logprobs": 3, "temperature": 0},
]
# Rows of 1000 logits: as models give them, with ties, and one likeliest by far.
ROWS = ("spread", "ties", "peak")


def _logits(kind: str, rows: int) -> np.ndarray:
    random = np.random.default_rng(7)
    logits = random.normal(0, 3, (rows, 1000)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "peak":
        logits[:, 123] += 40
    return logits


def _sequences(seed: int) -> list[Sequence]:
    made = []
    for number, params in enumerate(PARAMS):
        request = Request([5, 6, 7, 8 + number], SamplingParams(seed=seed + number, **params))
        made.append(Sequence.of(request, (), number))
    return made


def _differ(one: Outcome, other: Outcome) -> bool:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return str(one) != str(other)
    near = abs(one.logprob - other.logprob) < 1e-4
    return one.token_id != other.token_id or one.top != other.top or not near


def beside_host(kind: str) -> list[Any]:
    """Choose 20 tokens of each request in both ways; return where they differ."""
    ours, hosts = _sequences(1), _sequences(1)
    wrong: list[Any] = []
    for turn in range(20):
        logits = np.roll(_logits(kind, len(PARAMS)), turn, axis=1)
        if turn == 19:
            logits[3, 5] = np.nan
            logits[0, 5] = -np.inf
        found = device_sampler.sample_on_device(paddle.to_tensor(logits), list(map(Row, ours)))
        expected = sample_rows(logits, list(map(Row, hosts)))
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if _differ(one, other):
                wrong.append([turn, number, str(one), str(other)])
            if not isinstance(other, Exception):
                for sequence in (ours[number], hosts[number]):
                    sequence.append(other)
    return wrong


def doubts() -> list[list[int]]:
    """Return the requests that the host decides, usually and where every row is in doubt."""
    read, real = [], device_sampler.sample_rows
    device_sampler.sample_rows = lambda logits, rows: (
        read.append(rows[0].sequence.arrival) or real(logits, rows)
    )
    counts = []
    for doubt in (device_sampler.DOUBT, 2.0):
        read.clear()
        device_sampler.DOUBT = doubt
        logits = paddle.to_tensor(_logits("spread", len(PARAMS)))
        device_sampler.sample_on_device(logits, list(map(Row, _sequences(1))))
        counts.append(list(read))
    return counts


def counted(kind: str) -> dict[str, Any]:
    """Count reads of the device and dispatched operators, in all and in layers, of steps.

    Args:
        kind: ``greedy`` or ``drawn``; ``plain`` is greedy with operators one by one.
    """
    model = network("bfloat16")
    if kind == "plain":
        model = build_model(model.config, seed=0, dtype="bfloat16", ops={"others": "reference"})
    else:
        pack(model)
    engine = Engine(DygraphRunner(model), max_sequences=2, max_tokens=64, max_step_tokens=16)
    options = {"top_k": 20, "top_p": 0.9} if kind == "drawn" else {"temperature": 0}
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, seed=1, **options)
    for length in (9, 30):
        engine.add(Request(list(range(1, length + 1)), params))
    found = {}
    with Counter() as counter:
        for name in ("prompts", "a later part", "its end", "single tokens"):
            engine.step()
            found[name] = counter.taken(len(model.model.layers))
    return found


def trained(kind: str) -> dict[str, Any]:
    """Count reads and operators of a forward and a backward pass.

    Args:
        kind: ``auto`` or ``reference``, the form of all ops; ``float8`` is ``auto`` with ``--fp8``.
    """
    float8, config = kind == "float8", network("float32").config
    ops = {"others": "auto" if float8 else kind, "cross_entropy": "auto"}
    if float8:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
        config = dataclasses.replace(config, **sizes, **heads)
    model = build_model(config, seed=0, ops=ops, dtype="bfloat16", fp8=float8)
    model.train()
    rows = 4  # 128 tokens, to which float8 has to add none
    ids, labels = paddle.arange(rows * 32).reshape([rows, 32]), paddle.arange(1, rows * 32 + 1)
    segments = paddle.zeros([rows, 32], "int64")
    positions = paddle.arange(32).unsqueeze(0).expand([rows, 32])
    model.token_losses(ids, labels, positions, segments)[0].mean().backward()
    with Counter() as counter:
        model.token_losses(ids, labels, positions, segments)[0].mean().backward()
        return counter.taken(len(model.model.layers))


def updates(words: list[str]) -> list[list[int]]:
    """Run pretraining with these words; return reads and operators of each update but the first."""
    from llm import runtime
    from llm.parallel.updater import Updater

    runtime.prepare = lambda *_, **__: 1
    sys.argv = ["run_pretrain.py", *words]
    seen: list[list[int]] = []
    real = Updater.step
    with Counter() as counter:

        def step(self: Any, *args: Any, **more: Any) -> Any:
            result = real(self, *args, **more)
            seen.append([counter.reads, len(counter.operators)])
            return result

        Updater.step = step
        importlib.import_module("run_pretrain").main()
        Updater.step = real
    return np.diff(seen, axis=0).tolist()


class Counter:
    """Counts, while it is entered, calls of Paddle's operators and reads of its tensors.

    Operators are counted where Python hands them to Paddle; what calls one inside of another
    operator is not seen, nor what makes a tensor of an array: both of Paddle's ways copy it alike.
    """

    READS = ("numpy", "item", "tolist", "__int__", "__float__", "__bool__", "__index__")
    METHODS = ("__add__", "__sub__", "__mul__", "__truediv__", "__neg__", "__getitem__")
    METHODS += ("__radd__", "__rmul__", "astype", "__setitem__", "__le__", "__ge__", "__lt__")

    def __init__(self) -> None:
        self.reads = 0
        self.operators: list[str] = []
        self.layers = 0
        self._undo: list[tuple[Any, str, Any]] = []
        self._depth = 0

    def _replace(self, owner: Any, name: str, made: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, made)

    def _counting(self, name: str, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if self._depth == 0:
                self.operators.append(name)
            self._depth += 1
            try:
                return real(*args, **more)
            finally:
                self._depth -= 1

        return call

    def _uncounted(self, real: Any) -> Any:
        def call(*args: Any) -> Any:
            self._depth += 1
            try:
                return real(*args)
            finally:
                self._depth -= 1

        return call

    def _reading(self, real: Any) -> Any:
        def call(tensor: Any, *args: Any, **more: Any) -> Any:
            if self._depth == 0 and not tensor.place.is_cpu_place():
                self.reads += 1
            self._depth += 1
            try:
                return real(tensor, *args, **more)
            finally:
                self._depth -= 1

        return call

    def __enter__(self) -> "Counter":
        operators, tensor = paddle._C_ops, type(paddle.zeros([1]))
        for name in dir(operators):
            real = getattr(operators, name)
            if not name.startswith("_") and callable(real):
                self._replace(operators, name, self._counting(name, real))
        self._replace(tensors, "empty_tensor", self._uncounted(tensors.empty_tensor))
        for name in self.METHODS:
            if hasattr(tensor, name):
                self._replace(tensor, name, self._counting(name, getattr(tensor, name)))
        for name in self.READS:
            if hasattr(tensor, name):
                self._replace(tensor, name, self._reading(getattr(tensor, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, real in reversed(self._undo):
            setattr(owner, name, real)

    def taken(self, layers: int) -> dict[str, Any]:
        """Return what was counted since the last call; a layer is from one gate to the next."""
        names = self.operators
        gates = [n for n, name in enumerate(names) if name in ("swiglu", "silu")]
        found = {
            "reads": self.reads,
            "operators": len(names),
            "a layer": (gates[-1] - gates[0]) / (layers - 1),
            "names": names[gates[0] : gates[1]],
        }
        self.reads, self.operators = 0, []
        return found
