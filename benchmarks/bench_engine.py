"""The engine beside its peers, and beside itself without a feature.

    python benchmarks/bench_engine.py [--parts PART ...] [--rounds N]

Both sides of a pair take turns; figures are medians, and the range is printed.

peers       loads of many requests on random weights, beside OpenVINO GenAI, vLLM and llama.cpp: 8
            and 24 clients, prompts that share 1,000 tokens, long prompts beside running answers
            (--kinds, --loads, --peers, --shape, --models, --step_tokens)
lookup      a trained model (`make real-model`) answers prompts that ask for their own text, and
            others, with prompt lookup and without; its tokens are compared
draft       a 100M shape with a scripted draft that agrees with it seven times in ten and takes a
            tenth of its time
sample      24 rows of 128,256 logits: the native op beside NumPy
overhead    a step of 24 sequences without its runner
memory      what the process and its objects grow by from the 1,000th to the 10,000th request
adapters    8 sequences of a 100M shape: none with an adapter, all with one, and two with each of
            four, LoRA of rank 16 in all linears of the layers
"""

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine_peers
import generation_models as shared
from generation_engines import LOADS
from generation_peers import KINDS, PEERS
from record import ROOT, environment, median, write_row

sys.path.insert(0, str(ROOT))

from llm import runtime

TEXT = (
    "The committee met on Tuesday to review the budget for the coming year. Several members asked "
    "why the cost of heating had risen by a fifth, and the treasurer promised a written answer "
    "before the end of the month. The library will stay open on Saturdays until further notice."
)
QUOTING = (
    f"Repeat this text word by word, nothing else:\n{TEXT}",
    "Correct the spelling of this text and change nothing else:\n"
    + TEXT.replace("treasurer", "tresurer"),
    "Rename the variable x to total in this code and print the whole code:\n"
    "x = 0\nfor number in range(10):\n    x = x + number\n"
    "    if x > 20:\n        print(x)\nprint(x)",
)
FREE = ("Write a short story about a fox.", "Why is the sky blue?", "Give me a recipe for soup.")
ROWS, VOCABULARY = 24, 128_256


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return seconds and what the call gave."""
    began = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - began, result


def one_by_one(engine: Any, requests: Sequence[Any]) -> list[Any]:
    """Answer one request after the other."""
    return [engine.generate([one])[0] for one in requests]


def steps(engine: Any, count: int) -> None:
    """Run steps."""
    for _ in range(count):
        engine.step()


def row_of(name: str, values: Sequence[float], unit: str) -> dict[str, Any]:
    """Print a median with its range, and return it."""
    found = round(median(values), 3)
    print(f"{name:<44} {found:>9.3f} {unit}  ({min(values):.3f} to {max(values):.3f})")
    return {name: found}


def lookup(place: str, rounds: int) -> dict[str, Any]:
    """Measure prompt lookup on a trained model; answers with and without are the same."""
    from llm.config.generation import OpenArguments
    from llm.engine.finding import find_model
    from llm.engine.opening import open_model
    from llm.engine.request import Request, SamplingParams
    from llm.engine.speculation import PromptLookup

    which = OpenArguments(model_name_or_path=place, dtype="bfloat16")
    which.validate()
    model = open_model(which, find_model(which))
    found: dict[str, Any] = {}
    for kind, prompts in (("quoting", QUOTING), ("others", FREE)):
        asked = [
            Request(
                model.tokenizer.apply_chat_template([{"role": "user", "content": one}]),
                SamplingParams(max_new_tokens=100, temperature=0),
            )
            for one in prompts
        ]
        gains, shares = [], []
        for _ in range(rounds):
            seconds, ids = {}, {}
            for name in ("plain", "lookup"):
                drafter = PromptLookup(10) if name == "lookup" else None
                engine = replace_drafter(model, drafter).open_engine(1, 1024)
                engine.generate([Request([1], SamplingParams(4, temperature=0))])
                seconds[name], answers = timed(one_by_one, engine, asked)
                ids[name] = [one.ids for one in answers]
            assert ids["plain"] == ids["lookup"], "guesses changed an answer"
            gains.append(seconds["plain"] / seconds["lookup"])
            shares.append(engine.num_accepted / max(engine.num_drafted, 1))
        found |= row_of(f"lookup, {kind}: times as fast", gains, "x")
        found |= row_of(f"lookup, {kind}: share of guesses right", shares, "")
    return found


def replace_drafter(model: Any, drafter: Any) -> Any:
    """Return the opened model with another drafter."""
    import dataclasses

    return dataclasses.replace(model, drafter=drafter)


class Scripted:
    """Knows the answer; every guess but the last may be wrong three times in ten."""

    most = 8

    def __init__(self, answers: dict[tuple[int, ...], list[int]], step_seconds: float) -> None:
        import random

        self._answers, self._seconds, self._rng = answers, step_seconds / 10, random.Random(1)

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Nothing."""

    def follow(self, sequences: Any) -> None:
        """Nothing."""

    def propose(self, wanted: Any) -> list[list[int]]:
        """Take the time of a model, and return what it might say."""
        depth = max(count for _, count in wanted)
        end = time.perf_counter() + depth * self._seconds
        guesses = []
        for sequence, count in wanted:
            answer = self._answers[tuple(sequence.request.prompt_ids)]
            done = len(sequence.tokens) - len(sequence.request.prompt_ids)
            right = answer[done : done + count]
            guesses.append([one if self._rng.random() < 0.7 else one ^ 1 for one in right])
        while time.perf_counter() < end:
            pass
        return guesses


def draft(rounds: int) -> dict[str, Any]:
    """Measure guesses of a second model, one sequence at a time."""
    from llm.engine.engine import Engine
    from llm.engine.request import Request, SamplingParams
    from llm.engine.runners import DygraphRunner
    from llm.llama.build import build_model
    from llm.llama.config import PRESETS
    from llm.llama.fused import pack

    config = PRESETS["llama-7b"].replace(**shared.SHAPES["100M"])
    runner = DygraphRunner(pack(build_model(config, seed=1, dtype="bfloat16", to_pack=True)))
    request = Request([5, 6, 7], SamplingParams(100, temperature=0, ignore_eos=True))
    gains = []
    for _ in range(rounds + 1):  # the first warms up
        plain = Engine(runner, max_sequences=1, max_tokens=128)
        alone, (expected,) = timed(plain.generate, [request])
        script = Scripted({(5, 6, 7): expected.ids}, alone / 100)
        engine = Engine(runner, max_sequences=1, max_tokens=128, drafter=script)
        seconds, (answer,) = timed(engine.generate, [request])
        assert answer.ids == expected.ids, "guesses changed an answer"
        gains.append(alone / seconds)
    return row_of("draft that agrees 70 %: times as fast", gains[1:], "x")


def sample(rounds: int) -> dict[str, Any]:
    """Measure the sampler's op and its reference on rows that are nearly flat."""
    import numpy as np
    import paddle

    from external_ops import native
    from external_ops.sampling import Settings, sample_native, sample_ref

    logits = np.random.default_rng(0).standard_normal((ROWS, VOCABULARY)).astype(np.float32)
    tensor = paddle.to_tensor(logits)
    kernels = {"NumPy": sample_ref} | ({"native": sample_native} if native.available() else {})
    found: dict[str, Any] = {}
    for name, limits in (
        ("greedy", {"temperature": 0}),
        ("temperature 1", {}),
        ("top_p 0.95", {"top_p": 0.95}),
        ("top_k 50", {"top_k": 50}),
    ):
        settings = [Settings(**limits, place=(n + 0.5) / ROWS) for n in range(ROWS)]
        times: dict[str, list[float]] = {kind: [] for kind in kernels}
        for _ in range(rounds + 1):
            for kind, kernel in kernels.items():
                seconds, _ = timed(kernel, tensor, [None] * ROWS, settings)
                times[kind].append(1000 * seconds)
        for kind, values in times.items():
            found |= row_of(f"sample, {name}, {kind}", values[1:], "ms")
    return found


class Instant:
    """A runner that takes no time: logits of few tokens, the same in each step."""

    block_size, vocab_size, max_model_len, longest = 16, 64, 4096, 4096
    eos_ids = ()

    def __init__(self) -> None:
        import numpy as np
        import paddle

        from external_ops.backend import select_ops

        logits = np.random.default_rng(0).standard_normal((ROWS, self.vocab_size))
        self._logits = paddle.to_tensor(logits.astype(np.float32))
        self._kernel = select_ops(device="cpu").sample

    def allocate(self, num_blocks: int) -> None:
        """Nothing."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Nothing."""

    def sample(self, batch: Any, rows: Sequence[Any]) -> Any:
        """Choose tokens, as runners on CPUs do."""
        from llm.engine.sampler import sample_rows

        return sample_rows(self._logits[: len(rows)], rows, self._kernel)


def overhead(rounds: int) -> dict[str, Any]:
    """Measure what a step of decoding costs beside the runner."""
    from llm.engine.engine import Engine
    from llm.engine.request import Request, SamplingParams

    found: dict[str, Any] = {}
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        params = SamplingParams(400, temperature, seed=1, ignore_eos=True)
        requests = [Request([1 + n] * 600, params) for n in range(ROWS)]
        values = []
        for _ in range(rounds):
            engine = Engine(Instant(), max_sequences=ROWS, max_tokens=1024, max_step_tokens=20000)
            for request in requests:
                engine.add(request)
            engine.step()
            seconds, _ = timed(steps, engine, 300)
            values.append(1000 * seconds / 300)
        found |= row_of(f"overhead of a step of {ROWS} sequences, {name}", values, "ms")
    return found


def write_adapters(config: Any, place: Path, count: int) -> list[Path]:
    """Write LoRA adapters of rank 16 in all linears, whose products are not zero."""
    import numpy as np

    from llm.llama.adapters.lora import LoRAConfig, adapted, add_lora, save_lora, set_numbers
    from llm.llama.build import build_model

    model = add_lora(build_model(config, seed=1), LoRAConfig(r=16, lora_alpha=16), seed=2)
    random, places = np.random.default_rng(0), [place / str(n) for n in range(count)]
    for one in places:
        for layer in adapted(model).values():
            shape = layer.lora_B.shape
            set_numbers(layer.lora_B, random.normal(0, 0.02, shape).astype(np.float32))
        save_lora(model, one)
    return places


def adapters(rounds: int) -> dict[str, Any]:
    """Measure decoding of 8 sequences whose adapters are none, one and four."""
    from llm.engine.engine import Engine
    from llm.engine.request import Request, SamplingParams
    from llm.engine.runners import DygraphRunner
    from llm.llama.build import build_model
    from llm.llama.config import PRESETS
    from llm.llama.fused import pack

    config = PRESETS["llama-7b"].replace(**shared.SHAPES["100M"])
    runner = DygraphRunner(pack(build_model(config, seed=1, dtype="bfloat16", to_pack=True)))
    with tempfile.TemporaryDirectory() as place:
        for one in write_adapters(config, Path(place), 4):
            size = runner.adapters.load(one.name, one).nbytes
    print(f"{'an adapter':<44} {size / 2**20:>9.3f} MiB")
    params = SamplingParams(64, temperature=0, ignore_eos=True)
    kinds = {"none": [None] * 8, "one": ["0"] * 8, "four": [str(n % 4) for n in range(8)]}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):  # the first warms up
        for kind, names in kinds.items():
            engine = Engine(runner, max_sequences=8, max_tokens=128)
            for n, name in enumerate(names):
                engine.add(Request([5 + n, 6, 7], params, adapter=name))
            engine.step()
            seconds, _ = timed(steps, engine, 63)
            rates[kind].append(8 * 63 / seconds)
    found: dict[str, Any] = {"MiB of an adapter": round(size / 2**20, 3)}
    for kind, values in rates.items():
        found |= row_of(f"8 sequences, adapters: {kind}", values[1:], "tokens/s")
    return found


def memory(_: int) -> dict[str, Any]:
    """Answer 10,000 requests of all kinds, some of which leave; measure what stays of them."""
    import gc
    import random

    from llm.engine.engine import Engine
    from llm.engine.request import Request, SamplingParams
    from llm.engine.speculation import PromptLookup

    rng = random.Random(0)
    engine = Engine(
        Instant(), max_sequences=ROWS, max_tokens=256, num_blocks=250, drafter=PromptLookup(4)
    )
    running: set[Any] = set()
    resident, objects = [], []
    for number in range(10_000):
        prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 100))]
        params = SamplingParams(rng.randrange(1, 30), rng.choice([0.0, 1.0]), ignore_eos=True)
        running.add(engine.add(Request(prompt, params, client=str(number))))
        while len(running) > 2 * ROWS or (number == 9_999 and running):
            for sequence in engine.step():
                if sequence.produced[-1].finish_reason or rng.random() < 0.01:
                    engine.abort(sequence)
                    running.discard(sequence)
        if number in (999, 9_999):
            gc.collect()
            objects.append(len(gc.get_objects()))
            with Path("/proc/self/statm").open(encoding="utf-8") as file:
                resident.append(int(file.read().split()[1]) * 4096 / 2**20)
    found = row_of("memory, 1,000 to 10,000 requests: resident", [resident[1] - resident[0]], "MiB")
    grown = objects[1] - objects[0]
    return found | row_of("memory, 1,000 to 10,000 requests: objects", [grown], "")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ["peers", "lookup", "draft", "sample", "overhead", "memory", "adapters"]
    parser.add_argument("--model_name_or_path", default=str(ROOT / "outputs/real-model"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    group = parser.add_argument_group("peers")
    group.add_argument("--shape", default="1.1B", help="NAME, or NAME/LAYERS")
    group.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    group.add_argument("--loads", nargs="+", metavar="PATTERN", default=["*"])
    group.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    group.add_argument("--models", help="keep models in this directory, and use what is there")
    group.add_argument("--step_tokens", type=int, default=512, help="tokens of a step, of all")
    args = parser.parse_args()
    loads = [one for one in LOADS if any(fnmatch.fnmatch(one, p) for p in args.loads)]
    if not loads:
        parser.error(f"no load matches {args.loads}; there are: {'; '.join(LOADS)}")
    args.loads = loads
    try:
        shared.sizes_of(args.shape)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Run the parts and store rows."""
    args = parse()
    load = Path("/proc/loadavg").read_text(encoding="utf-8").split()[0]
    if "peers" in args.parts:
        engine_peers.main(args)
        args.parts.remove("peers")
    if "lookup" in args.parts and not Path(args.model_name_or_path).is_dir():
        print(f"lookup is left out: no {args.model_name_or_path}; make real-model makes it")
        args.parts.remove("lookup")
    if not args.parts:
        return
    runtime.prepare(args.threads, "cpu")
    runtime.load_paddle("cpu")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "lookup": lambda: lookup(args.model_name_or_path, args.rounds),
        "draft": lambda: draft(args.rounds),
        "sample": lambda: sample(args.rounds),
        "overhead": lambda: overhead(args.rounds),
        "adapters": lambda: adapters(args.rounds),
        "memory": lambda: memory(args.rounds),
    }
    found: dict[str, Any] = {}
    for name in args.parts:
        found |= parts[name]()
    row = {"threads": args.threads, "rounds": args.rounds, "load_before": float(load)}
    write_row("engine", {**row, "figures": found, **environment()})


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the rows of finished loads are kept") from None
