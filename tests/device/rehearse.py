"""Rehearses a recipe for GPUs: ``make rehearse RECIPE=configs/pretrain_llama2_7b_8gpu.yaml``.

The recipe is shrunken (shrink.py) and runs on the rehearsal device as a GPU, once in one go and
once resumed from the middle, which has to give the same numbers, bit for bit; a pretraining layout
of several ranks once more on one rank, whose losses it has to follow. At the end it says what all
of this cannot show.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.ending import run_script
from common.errors import UserError
from data.corpus.token_store_writer import TokenStoreWriter
from llm.llama.config import TINY_NAME, LlamaConfig
from tests.device import build
from tests.device.forks import TRAINING, Device
from tests.device.shrink import RULES, STEPS, Rehearsal, cannot_show, rehearsals
from tests.distributed.rank_server import RankError

# Sums in another order move losses near ln 1024 by a rounding of bfloat16 logits.
BAND = 5e-3
# ``execute(script, words, ranks)`` runs a script on ranks with a device each, or raises.
Execute = Callable[[str, list[str], int], None]


def write_model(described: dict[str, Any], directory: str) -> None:
    """Write a network of random weights, with the built-in tokenizer, as a user's directory."""
    from data.tokenizer import load_tokenizer
    from llm.llama.build import build_model, save_model

    save_model(build_model(LlamaConfig.from_hf(described), seed=3), directory)
    load_tokenizer(TINY_NAME).save(Path(directory))


def make_model(device: Device, run: Rehearsal, directory: Path) -> None:
    """Write a rehearsal's network in a fork, since the device is the caller's no longer then."""
    described = run.shape.to_hf()
    device.call("itself", "tests.device.rehearse:write_model", described, str(directory))


def write_store(place: Path) -> Path:
    """Write random documents; return the prefix of the store."""
    random = np.random.default_rng(7)
    with TokenStoreWriter(place / "corpus", "uint16", vocab_size=1024) as writer:
        for _ in range(200):
            writer.add_document(random.integers(3, 1024, random.integers(20, 200)))
    return place / "corpus"


def settings(run: Rehearsal, model: Path, store: Path) -> dict[str, Any]:
    """Return the recipe of a rehearsal."""
    named = {"model_name_or_path": str(model)} | (
        {"input_dir": str(store)} if run.pretrains else {}
    )
    return run.flags | run.degrees | named


def write_recipe(recipe: dict[str, Any], output: Path, **changes: Any) -> list[str]:
    """Write a recipe beside the directory of its output; return the words behind the script."""
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe | {"output_dir": str(output)} | changes), "utf-8")
    return [str(file)]


def logged(output: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each update."""
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def on_one_rank(run: Rehearsal, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of the same updates on one rank."""
    parallel = (*run.degrees, "sequence_parallel", "sharding", "virtual_pp_degree")
    shares = run.degrees.get("sharding_parallel_degree", 1)
    shares *= run.degrees.get("data_parallel_degree", 1)
    steps = "gradient_accumulation_steps"
    alone = {name: value for name, value in recipe.items() if name not in parallel}
    return alone | {steps: shares * recipe.get(steps, 1)}


def rehearse(run: Rehearsal, model: Path, place: Path, execute: Execute) -> list[str]:
    """Run a shrunken recipe; return what was seen, a line each.

    Args:
        run: what to run.
        model: directory of its network.
        place: a directory for everything that is written.
        execute: runs a script.

    Raises:
        UserError: numbers that should be equal are not.
    """
    recipe = settings(run, model, write_store(place))
    execute(run.script, write_recipe(recipe, place / "whole"), run.ranks)
    whole = logged(place / "whole")
    losses = " ".join(f"{loss:.4f}" for loss, _ in whole)
    seen = [f"{STEPS} updates on {run.layout}; losses {losses}"]
    middle = place / "whole" / f"checkpoint-{STEPS // 2}"
    changes = {"resume_from_checkpoint": str(middle)}
    execute(run.script, write_recipe(recipe, place / "resumed", **changes), run.ranks)
    resumed = logged(place / "resumed")
    if resumed != whole[STEPS // 2 :]:
        raise UserError(f"resumed, {run.name} gives {resumed}, in one go {whole[STEPS // 2 :]}")
    seen.append(f"resumed after {STEPS // 2} updates: the same numbers, bit for bit")
    if run.pretrains and run.ranks > 1:
        execute(run.script, write_recipe(on_one_rank(run, recipe), place / "single"), 1)
        single = logged(place / "single")
        far = max(abs(a - b) for (a, _), (b, _) in zip(whole, single, strict=True))
        if far > BAND:
            raise UserError(f"{run.name} on {run.layout}: losses {whole} are {single} on one rank")
        seen.append(f"on one rank: losses differ by {far:.1e} at most, the band is {BAND}")
    return seen


def executor(device: Device, seconds: float = 600) -> Execute:
    """Return what runs scripts on forks, as a GPU.

    Args:
        device: the server of the forks.
        seconds: that a run may take.
    """

    def execute(script: str, words: list[str], ranks: int) -> None:
        start = time.monotonic()
        try:
            device.script("gpu", script, words, ranks, timeout=seconds)
        except RankError as error:
            raise UserError(f"{script}.py {' '.join(words)}\n{error}") from error
        took = time.monotonic() - start
        print(f"  {script}.py on {ranks} rank{'s'[: ranks > 1]}: {took:.0f} s", flush=True)

    return execute


def main() -> None:
    """Rehearse the recipes of the command line, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="+", help="a file of configs/, or your own")
    recipes = parser.parse_args().recipe
    if not build.is_current():
        raise UserError("the rehearsal device is not built from these sources: `make device`")
    runs = [run for recipe in recipes for run in rehearsals(recipe)]
    print(f"shrunken by these rules:\n{RULES}\n")
    device = Device()
    device.server.preload(*TRAINING)
    try:
        for number, run in enumerate(runs, start=1):
            print(f"{number} of {len(runs)}: {run.name} on {run.layout}", flush=True)
            with tempfile.TemporaryDirectory(prefix="rehearse-") as name:
                place = Path(name)
                make_model(device, run, place / "model")
                for line in rehearse(run, place / "model", place, executor(device)):
                    print(f"  {line}")
    finally:
        device.close()
    print("\nwhat this cannot show:")
    for line in dict.fromkeys(line for run in runs for line in cannot_show(run)):
        print(f"* {line}")


if __name__ == "__main__":
    run_script(main)
