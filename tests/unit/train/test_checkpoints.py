"""Checkpoint directories: complete or ignored, whatever happens in between."""

import json
import resource

import pytest

from common.errors import UserError
from llm.train import checkpoints
from llm.train.logs import RunLog, read_log
from llm.train.saver import Saver


def save(output_dir, step, content=b"x" * 100):
    def fill(directory, work):
        work.do(lambda: (directory / "model.safetensors").write_bytes(content))

    Saver(output_dir).save(step, fill)
    return checkpoints.checkpoint_path(output_dir, step)


def steps(output_dir):
    return [checkpoint.step for checkpoint in checkpoints.find_checkpoints(output_dir)[0]]


def test_complete_ones_are_found_in_order_of_steps(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step)
    assert steps(tmp_path) == [5, 20, 100]
    found, messages = checkpoints.find_resume(tmp_path, "true")
    assert found.step == 100 and messages == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "complete.json").unlink(), "no complete.json"),
        (lambda path: (path / "complete.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 7), "has 7 of 100 bytes"),
    ],
)
def test_damaged_ones_are_ignored_with_a_message(tmp_path, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found, messages = checkpoints.find_resume(tmp_path, "true")
    assert found.step == 1
    assert len(messages) == 1 and "checkpoint-2" in messages[0] and reason in messages[0]
    with pytest.raises(UserError, match=r"checkpoint-2 is not complete: .*" + reason):
        checkpoints.find_resume(tmp_path, str(tmp_path / "checkpoint-2"))


def test_a_failing_save_leaves_the_earlier_one_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def fill(directory, work):
        work.do(lambda: (directory / "model.safetensors").write_bytes(b"half"))
        raise RuntimeError("killed in the middle")

    with pytest.raises(RuntimeError):
        Saver(tmp_path).save(2, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_full_disk_is_one_message_that_names_what_is_kept(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step 2: cannot write the checkpoint .*checkpoint-1"):
            save(tmp_path, 2, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 3, b"old")
    assert (save(tmp_path, 3, b"new!") / "model.safetensors").read_bytes() == b"new!"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_rotation_keeps_the_newest_and_never_counts_incomplete_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoint-4" / "complete.json").unlink()
    deleted = checkpoints.rotate(tmp_path, 1)
    assert [path.name for path in deleted] == ["checkpoint-1", "checkpoint-2"]
    assert steps(tmp_path) == [3]
    assert checkpoints.rotate(tmp_path, 1) == [] and checkpoints.rotate(tmp_path, None) == []


def test_leftovers_of_killed_saves_are_swept_with_a_message(tmp_path):
    (tmp_path / ".checkpoint-7.123.tmp").mkdir()
    (tmp_path / ".final-123.tmp").mkdir()
    save(tmp_path, 5)
    messages = checkpoints.sweep(tmp_path)
    assert len(messages) == 2 and "interrupted save" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_resuming_needs_something_to_resume(tmp_path):
    assert checkpoints.find_resume(tmp_path, None) == (None, [])
    assert checkpoints.find_resume(tmp_path, "false") == (None, [])
    with pytest.raises(UserError, match="no complete checkpoint in"):
        checkpoints.find_resume(tmp_path, "true")
    with pytest.raises(UserError, match=r"checkpoint-9 is not a directory; complete .*: none"):
        checkpoints.find_resume(tmp_path, str(tmp_path / "checkpoint-9"))


def test_going_back_behind_newer_checkpoints_is_refused(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    with pytest.raises(UserError, match=r"checkpoint-2 is newer than .*checkpoint-1"):
        checkpoints.find_resume(tmp_path, str(old))
    assert checkpoints.find_resume(tmp_path / "elsewhere", str(old))[0].step == 1
    assert checkpoints.find_resume(tmp_path, str(new))[0].step == 2


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    save(tmp_path, 1)
    for name in ("train_log.jsonl", "loss_curve.png", "eval_results.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "corpus.bin").touch()
    checkpoints.clear_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "notes.txt"]


def test_final_model_replaces_shards_of_an_earlier_one(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").touch()
    Saver(tmp_path).final(
        lambda place, work: work.do(lambda: (place / "model.safetensors").write_bytes(b"weights"))
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_log_is_rewound_to_the_checkpoint_and_survives_a_cut_off_line(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 0.1 * step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.rewind(2)
    assert read_log(log.path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    assert json.loads(log.path.read_text().splitlines()[1])["loss"] == 0.1 * 2
