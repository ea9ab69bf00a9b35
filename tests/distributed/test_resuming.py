"""Six layouts read each other's checkpoints: the same tensors, and the same losses afterwards."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.checkpoint_layouts import LAYOUTS, SAVED, STEPS, ranks_of

# Beside its own, every layout reads one other's checkpoint every day, and all of them on long days.
EVERY_DAY = {
    "one": "tp2pp2",
    "tp2": "stage3",
    "pp2": "stage1",
    "stage1": "pp2",
    "stage3": "tp2",
    "tp2pp2": "one",
}


def sources(target):
    """Return the layouts whose checkpoints one layout reads."""
    return list(LAYOUTS) if os.environ.get("RUN_LONG") else [target, EVERY_DAY[target]]


def pairs():
    """Yield every pair of layouts; those of long days are marked."""
    for source in LAYOUTS:
        for target in LAYOUTS:
            short = source in (target, EVERY_DAY[target])
            yield pytest.param(source, target, marks=() if short else pytest.mark.long)


@pytest.fixture(scope="module")
def trained(trainers, tmp_path_factory):
    """A run of every layout, with a checkpoint half-way."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in LAYOUTS:
        trainers(ranks_of(name), "jobs_checkpoints:train", name, str(root))
    return root


@pytest.fixture(scope="module")
def resumed(trainers, trained):
    """Every layout's run continued under others."""
    for name in LAYOUTS:
        arguments = (name, str(trained), sources(name))
        trainers(ranks_of(name), "jobs_checkpoints:resume_each", *arguments, timeout=120)
    return trained


def losses(output):
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return {(r := json.loads(line))["step"]: (r["loss"], r["grad_norm"]) for line in lines}


def tensors(directory):
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys(), file
        found |= part
    return found


@pytest.mark.parametrize(("source", "target"), pairs())
def test_the_next_losses_are_those_of_the_run_that_saved(resumed, source, target):
    whole, again = losses(resumed / source), losses(resumed / f"{source}-{target}")
    last = range(SAVED + 1, STEPS + 1)
    assert sorted(again) == list(last)
    for step in last:
        if source == target:
            assert again[step] == whole[step]
        else:
            np.testing.assert_allclose(again[step], whole[step], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), pairs())
def test_reading_and_writing_again_changes_no_bit(resumed, source, target):
    wanted = tensors(resumed / source / f"checkpoint-{SAVED}")
    found = tensors(resumed / f"{source}-{target}" / f"checkpoint-{SAVED}")
    assert wanted.keys() == found.keys() and len(wanted) == 20 * 5
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), name


def test_a_prefix_of_four_ranks_is_the_file_of_one(trainers, tmp_path):
    for name in ("one", "tp2pp2"):
        trainers(ranks_of(name), "jobs_checkpoints:save_a_prefix", name, str(tmp_path))
    for file in ("adapter_model.safetensors", "prefix_encoder.safetensors", "adapter_config.json"):
        one, four = ((tmp_path / name / file).read_bytes() for name in ("one", "tp2pp2"))
        assert one == four, file
    assert not list((tmp_path / "tp2pp2").glob(".*"))
