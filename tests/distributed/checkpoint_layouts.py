"""The layouts that read each other's checkpoints, and how long each trains."""

LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "stage1": {"sharding": 2, "sharding_stage": 1},
    "stage3": {"sharding": 2, "sharding_stage": 3},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
}
STEPS, SAVED, ROWS = 4, 2, 4


def ranks_of(name: str) -> int:
    """Return how many processes a layout takes."""
    degrees = {k: v for k, v in LAYOUTS[name].items() if k != "sharding_stage"}
    product = 1
    for degree in degrees.values():
        product *= degree
    return product
