"""The layouts that read each other's checkpoints, and how long each trains."""

LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "stage1": {"sharding": 2, "sharding_stage": 1},
    "stage3": {"sharding": 2, "sharding_stage": 3},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
# Layouts that read the checkpoints of all, which hold whole tensors; the others read some.
THOROUGH = ("one", "tp2pp2")
STEPS, SAVED, ROWS = 4, 2, 4


def sources_of(target: str) -> list[str]:
    """Return the layouts whose checkpoints a layout reads."""
    return [name for name in LAYOUTS if target in THOROUGH or name in (target, *THOROUGH)]


def ranks_of(name: str) -> int:
    """Return how many processes a layout takes."""
    degrees = {k: v for k, v in LAYOUTS[name].items() if k != "sharding_stage"}
    product = 1
    for degree in degrees.values():
        product *= degree
    return product
