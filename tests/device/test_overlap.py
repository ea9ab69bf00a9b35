"""Communication beside computation on two ranks: the same bits, unless a wait is forgotten."""

import pytest

CASE = {"optimizer": "sgd", "tied": True, "packed": False, "accumulation": 2}
LAYOUTS = {
    "data": {"data": 2},
    "stage1": {"sharding": 2, "sharding_stage": 1},
    "stage3": {"sharding": 2, "sharding_stage": 3},
}
FORGOTTEN = {
    "data": ["sums"],
    "stage1": ["weights", "settle"],
    "stage3": ["weights"],
}


@pytest.mark.parametrize("name", ["data", pytest.param("stage1", marks=pytest.mark.long), "stage3"])
def test_bits_stay_until_a_wait_is_forgotten(device, name):
    arguments = (LAYOUTS[name], CASE, FORGOTTEN[name])
    ranks = device.call("gpu", "tests.device.jobs_overlap:trained", *arguments, ranks=2)
    for number, forgotten in enumerate(["nothing", *FORGOTTEN[name]]):
        changed = [rank[number] for rank in ranks]
        assert any(changed) == (number > 0), (forgotten, changed)


@pytest.mark.long
def test_the_flag_changes_no_number(pretrain):
    """Nor what is saved after an update, when weights may still be on their way."""
    flags = {"bf16": 1, "fp16_opt_level": "O2", "sharding": "stage1", "sharding_parallel_degree": 2}
    flags |= {"offload_optim": "static", "amp_master_grad": 1}
    flags |= {"save_strategy": "steps", "save_steps": 2}
    runs = [pretrain(ranks=2, overlap_communication=on, **flags) for on in (0, 1)]
    plain, overlapped = runs
    assert overlapped.rows == plain.rows
    for step in (2, 3):
        saved = [sorted(run.output.glob(f"checkpoint-{step}/model*.safetensors")) for run in runs]
        assert saved[0]
        for one, other in zip(*saved, strict=True):
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("role", ["gpu", "itself"])
def test_state_is_copied_beside_the_updates(device, role):
    def trained(forgets):
        return device.call(role, "tests.device.jobs_overlap:offloaded", forgets)[0]

    different, held = trained(False)
    assert different == 0
    assert 1 < held <= 2, "the largest state and its neighbours"
    assert trained(True)[0] > 0
