"""Random loads on networks with native kernels, beside every request's run alone, bit for bit.

What is compared is every event of every request: ids, log-probabilities as they are, the likeliest
tokens beside them, and why it ended. A load draws the network's type, arrivals, lengths, chunks of
prompts, few cache blocks, sequences with one beginning, `n`, priorities, who guesses tokens,
and the adapters of its requests.

    python -m tests.fuzz.loads --seconds 600
"""

import dataclasses
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm import runtime

runtime.prepare(1)


from external_ops import native
from llm.engine.draft_model import DraftModel
from llm.engine.engine import Engine
from llm.engine.request import Request, Token
from llm.engine.runners import DygraphRunner
from llm.engine.speculation import Drafter, PromptLookup, Speculator
from llm.llama.adapters.lora import LoRAConfig, save_lora
from llm.llama.adapters.prefix import save_prefix
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.fused import pack
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from tests.fuzz import Tally, budget
from tests.fuzz.load_cases import FIRST_ID, MOST, as_many_as_may_be, differing, draw, drive, room
from tests.unit.llama.adapters.adapter_models import with_lora, with_prefix

VOCAB, BLOCK = 200, 4
CONFIG = PRESETS["tiny-random-llama"].replace(
    num_hidden_layers=2,
    vocab_size=VOCAB,
    initializer_range=0.3,
    hidden_size=64,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
)
LORAS = {
    "all": LoRAConfig(r=5, lora_alpha=10),
    "some": LoRAConfig(r=2, use_rslora=True, target_modules=("v_proj", "up_proj", "lm_head")),
}
PREFIXES = {"short": 3, "block": 8}  # with MOST tokens behind the longer one the cache is full
KINDS = {"float32": (), "bfloat16": (), "W8": ("W8",), "W4": ("W4", 32), "A8W8": ("A8W8",)}


def _network(kind: str, seed: int) -> DygraphRunner:
    dtype = kind if kind == "bfloat16" else "float32"
    model = build_model(CONFIG, seed=seed, dtype=dtype, to_pack=True)
    if KINDS[kind]:
        quantize_model(model, QuantConfig.of_type(*KINDS[kind]))
    return DygraphRunner(pack(model), block_size=BLOCK)


def _write_adapters(place: Path) -> None:
    for seed, (name, config) in enumerate(LORAS.items()):
        save_lora(with_lora(build_model(CONFIG, seed=5), config, seed), place / name)
    for seed, (name, length) in enumerate(PREFIXES.items()):
        save_prefix(with_prefix(length, model=build_model(CONFIG, seed=5), seed=seed), place / name)


def _alone(runner: DygraphRunner, request: Request) -> list[Token]:
    engine = Engine(runner, max_sequences=1, max_tokens=MOST, prefix_cache=False)
    handle = engine.add(request)
    while engine.has_work:
        engine.step()
    return [*handle.scores, *handle.produced] if handle.produced else []


def _drafter(rng: random.Random) -> Drafter | None:
    """Return one of each kind that guesses, or none; drafts are as likely to be wrong as right."""
    most = rng.choice([1, 3, 6])
    kind = rng.choice(["none", "lookup", "same", "another"])
    if kind == "none":
        return None
    if kind == "lookup":
        return PromptLookup(most)
    return DraftModel(_network("float32", 5 if kind == "same" else 6), most)


class Loads:
    """Networks of every type, each made once."""

    def __init__(self) -> None:
        if not native.available():
            sys.exit(f"loads: {native.reason()}")
        self._networks = {kind: _network(kind, 5) for kind in KINDS}
        with tempfile.TemporaryDirectory() as place:
            _write_adapters(Path(place))
            for runner in self._networks.values():
                for name in (*LORAS, *PREFIXES):
                    runner.adapters.load(name, Path(place) / name)

    def run(self, seed: int) -> tuple[str, list[int], int]:
        """Run a load; return the network's type, the requests that differ, and their number."""
        rng = random.Random(seed)
        kind = rng.choice(list(KINDS))
        runner = self._networks[kind]
        made = draw(rng, rng.randrange(2, 12), range(FIRST_ID, VOCAB))
        names = rng.choice([(None,), (None, *runner.adapters.names)])
        made = [dataclasses.replace(one, adapter=rng.choice(names)) for one in made]
        expected = [_alone(runner, request) for request in made]
        engine = Engine(
            runner, num_blocks=rng.choice([16, 20, 60]), drafter=_drafter(rng), **room(rng)
        )
        free = engine.num_free_blocks
        got, leavers = drive(engine, made, rng)
        wrong = differing(got, leavers, expected)
        if engine.num_free_blocks != free:
            wrong.append(-1)
        return kind, wrong, len(made)


def main(argv: Sequence[str]) -> int:
    """Run loads within a budget."""
    plan, tally, loads, requests = budget(argv, __doc__ or ""), Tally("loads"), Loads(), 0
    Speculator.lengths = as_many_as_may_be  # type: ignore[method-assign]
    for seed in plan.seeds():
        kind, wrong, count = loads.run(seed)
        requests += count
        if wrong:
            tally.differ(seed, f"{kind}: requests {wrong} of {count}")
        else:
            tally.count(kind)
    print(f"loads: {requests} requests", flush=True)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
