"""Two updates under every layout: losses, gradient norms and weights are those of one process."""

import dataclasses

import pytest

# AdamW hides a gradient that is wrong by a factor, SGD shows it; the clip is always at work.
CASES = {
    "adamw": {"optimizer": "adamw", "tied": False, "packed": False},
    "sgd_tied": {"optimizer": "sgd", "tied": True, "packed": False},
    "packed": {"optimizer": "sgd", "tied": False, "packed": True},
}
ADAPTERS = {
    "lora": {"optimizer": "adamw", "tied": False, "packed": True, "adapter": "lora"},
    "dora": {"optimizer": "adamw", "tied": True, "packed": False, "adapter": "dora"},
    "prefix": {"optimizer": "adamw", "tied": True, "packed": False, "adapter": "prefix"},
}
# Gradients in float32 beside half-precision ones: the same numbers, since CPUs compute in float32.
MASTER = {"master": {"optimizer": "master", "tied": False, "packed": False}}
# Losses multiplied as float16 training does, with an overflow in one process before each update.
SCALED = {
    "scaled": {"optimizer": "sgd", "tied": False, "packed": False, "scale": 1024.0},
    "scaled_master": {"optimizer": "master", "tied": False, "packed": False, "scale": 1024.0},
}
LIMITS = {"loss": 1e-5, "norm": 1e-5, "weight": 1e-5}
ACCUMULATION = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout to train under.

    Four ranks whose optimizer does what two ranks' does train with SGD alone: it shows a wrong
    gradient, and of the networks the tied one shares most.
    """

    layout: dict
    ranks: int
    accumulation: int = 0  # 0: several micro-batches where they matter, see `pieces`
    cases: tuple[str, ...] = ("adamw", "sgd_tied")
    overlap: bool = False  # sums and transfers beside computation: the same bits as without


def ring(degree: int) -> dict:
    return {"context": degree, "context_kind": "ring"}


def ulysses(degree: int) -> dict:
    return {"context": degree, "context_kind": "ulysses"}


def sharded(stage: int) -> dict:
    return {"sharding": 2, "sharding_stage": stage}


LAYOUTS = {
    "dp2": Case({"data": 2}, 2, cases=("adamw", "sgd_tied", "master", *SCALED)),
    "tp2": Case({"tensor": 2}, 2, cases=("adamw", "sgd_tied", "packed", "scaled")),
    "tp4": Case({"tensor": 4}, 4, cases=("sgd_tied",)),
    "sp2": Case({"tensor": 2, "sequence_parallel": True}, 2, cases=tuple(CASES)),
    "pp2": Case({"pipeline": 2}, 2, cases=(*CASES, "scaled")),
    "pp4": Case({"pipeline": 4}, 4, cases=("sgd_tied",)),
    "pp3vpp2": Case({"pipeline": 3, "virtual_pipeline": 2}, 3, accumulation=6),
    "stage1": Case(sharded(1), 2, cases=("adamw", "sgd_tied", "scaled")),
    "stage2": Case(sharded(2), 2, cases=("adamw", "sgd_tied", "master", *SCALED)),
    "stage3": Case(sharded(3), 2, cases=("adamw", "sgd_tied", "scaled")),
    "ring2": Case(ring(2), 2, cases=(*CASES, "scaled")),
    "ring4": Case(ring(4), 4, cases=("sgd_tied",)),
    "ulysses2": Case(ulysses(2), 2, cases=tuple(CASES)),
    "ulysses4": Case(ulysses(4), 4, cases=("sgd_tied",)),
    "tp2pp2": Case({"tensor": 2, "pipeline": 2}, 4, cases=("sgd_tied",)),
    "sp2pp2": Case({"tensor": 2, "pipeline": 2, "sequence_parallel": True}, 4, cases=("sgd_tied",)),
    "tp2stage1": Case({"tensor": 2, **sharded(1)}, 4),
    "tp2stage3": Case({"tensor": 2, **sharded(3)}, 4, cases=("sgd_tied",)),
    "dp2tp2": Case({"data": 2, "tensor": 2}, 4, cases=("sgd_tied",)),
    "pp2stage1": Case({"pipeline": 2, **sharded(1)}, 4, cases=("adamw", "sgd_tied", "master")),
    "pp2stage2": Case({"pipeline": 2, **sharded(2)}, 4, cases=("sgd_tied",)),
    "tp2ring2": Case({"tensor": 2, **ring(2)}, 4, cases=("sgd_tied",)),
    "tp2ulysses2": Case({"tensor": 2, **ulysses(2)}, 4, cases=("sgd_tied",)),
    "dp2_overlap": Case({"data": 2}, 2, 3, ("sgd_tied",), True),
    "stage3_overlap": Case(sharded(3), 2, 3, ("sgd_tied",), True),
    "pp2stage2_overlap": Case({"pipeline": 2, **sharded(2)}, 4, 3, ("scaled_master",), True),
    "dp2stage1_overlap": Case({"data": 2, **sharded(1)}, 4, 3, ("sgd_tied",), True),
    "adapters_tp2pp2": Case({"tensor": 2, "pipeline": 2}, 4, cases=tuple(ADAPTERS)),
}


def pieces(layout: dict) -> bool:
    """Whether micro-batches are exchanged one by one: stages, and gradients that are sharded."""
    return "pipeline" in layout or layout.get("sharding_stage", 0) > 1


def with_accumulation(names: tuple[str, ...], accumulation: int) -> dict:
    cases = CASES | ADAPTERS | MASTER | SCALED
    return {name: {**cases[name], "accumulation": accumulation} for name in names}


@pytest.fixture(scope="session")
def alone(ranks, tmp_path_factory):
    """What one process gets, as files."""
    directory = tmp_path_factory.mktemp("one_process")
    cases = with_accumulation(tuple(CASES | ADAPTERS | MASTER | SCALED), ACCUMULATION)
    for name in ("master", "scaled_master"):
        cases[name]["optimizer"] = "adamw"
    for case in cases.values():
        case.pop("scale", None)
    ranks(1, "jobs_equality:train_alone", str(directory), cases)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_does(ranks, alone, name):
    case = LAYOUTS[name]
    micro_batches = case.accumulation or (ACCUMULATION if pieces(case.layout) else 1)
    cases = with_accumulation(case.cases, micro_batches)
    for rank, found in enumerate(
        ranks(case.ranks, "jobs_equality:train_like", str(alone), case.layout, cases, case.overlap)
    ):
        for kind, far in found.items():
            for figure, limit in LIMITS.items():
                assert far[figure] <= limit, (rank, kind, far)
            assert not far.get("bits"), (rank, kind, far)
