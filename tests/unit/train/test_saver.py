"""Saves by several ranks: threads stand in for processes, since the saver only asks for a team."""

import errno
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from common.errors import UserError
from llm.llama.files.checkpoint import find_tensors
from llm.llama.files.parts import Part, PartFiles
from llm.llama.files.weights import _finish
from llm.parallel.layout import Layout
from llm.parallel.topology import Topology
from llm.train import checkpoints
from llm.train.saver import Saver
from llm.train.state import _stored

RANKS = 4
LAYOUT = Layout(pipeline=2, data=2)


class Team(Topology):
    """A rank whose team are threads."""

    def gather_objects(self, item):
        self.items[self.rank] = item
        self.barrier_.wait()
        found = list(self.items)
        self.barrier_.wait()
        return found


def on_all_ranks(function):
    """Call with each rank's team; return results and errors by rank."""
    items, barrier = [None] * RANKS, threading.Barrier(RANKS, timeout=20)

    def call(rank):
        team = Team(LAYOUT, rank)
        object.__setattr__(team, "items", items)
        object.__setattr__(team, "barrier_", barrier)
        try:
            return function(team)
        except UserError as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(call, range(RANKS)))


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(team, directory, work, broken=None, pause=0.0):
    """Write a model of two stages, an optimizer and a file of each rank; one rank may fail."""
    parts = []
    for index in range(3):
        name = f"model.layers.{team.at.pipeline}.{index}"
        value = np.full([50], index, np.float32)
        fetch = lambda writer, value=value: value if writer == team.rank else None  # noqa: E731
        parts.append(Part(name, value.shape, "F32", fetch))
    model = PartFiles(directory, "model", team, work, 10**6)
    work.last(partial(_finish, model, [part.name for part in parts], {}))
    model.write(parts)
    if team.rank == broken:
        work.do(full_disk)
    work.do(lambda: time.sleep(pause))
    optimizer = PartFiles(directory, "optimizer", team, work, 10**6)
    work.last(optimizer.take_names)
    optimizer.write([Part(f"{p.name}/moment1_0", p.shape, "F32", p.fetch) for p in parts])
    own = directory / f"random_state-{team.rank:05}.json"
    work.do(partial(checkpoints.write_json, own, {}))


def save(output, step=1, *, background=False, **options):
    def run(team):
        saver = Saver(output, team, in_background=background)
        saver.save(step, partial(fill, team, **options))
        saver.wait()

    return on_all_ranks(run)


def test_ranks_write_their_files_and_an_index_that_counts_them(tmp_path):
    assert save(tmp_path) == [None] * RANKS
    place = tmp_path / "checkpoint-1"
    assert checkpoints.why_incomplete(place) is None
    files = sorted(path.name for path in place.glob("model-*"))
    assert files == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert len(find_tensors(place)) == len(_stored(place, "optimizer")) == 6
    assert len(list(place.glob("random_state-*.json"))) == RANKS
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * 50 * 4


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("broken", [0, 3])
def test_a_full_disk_of_one_rank_is_the_same_message_on_all(tmp_path, background, broken):
    save(tmp_path, 1)
    found = save(tmp_path, 2, background=background, broken=broken)
    assert {type(error) for error in found} == {UserError} and len(set(map(str, found))) == 1
    said = str(found[0])
    assert f"step 2: cannot write the checkpoint to {tmp_path}: rank {broken} on " in said
    assert "No space left" in said and "checkpoint-1" in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_error_in_the_background_is_raised_at_a_later_step(tmp_path):
    def run(team):
        saver = Saver(tmp_path, team, in_background=True)
        saver.save(1, partial(fill, team, broken=2, pause=0.1))  # raises nothing yet
        for step in range(2, 1000):
            try:
                saver.check()
            except UserError as error:
                saver.check()  # told once
                return step, str(error)
            time.sleep(0.005)
        return None

    found = on_all_ranks(run)
    assert len(set(found)) == 1 and "rank 2 on" in found[0][1]
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_while_a_thread_writes_and_the_next_save_waits(tmp_path):
    def run(team):
        saver = Saver(tmp_path, team, in_background=True)
        before = time.monotonic()
        saver.save(1, partial(fill, team, pause=0.4))
        took = time.monotonic() - before
        saver.check()
        early = (tmp_path / "checkpoint-1").exists()
        team.gather_objects(None)
        saver.save(2, partial(fill, team))
        saver.wait()
        return took, early

    for took, early in on_all_ranks(run):
        assert took < 0.35 and not early
    assert [c.step for c in checkpoints.find_checkpoints(tmp_path)[0]] == [1, 2]


def test_ctrl_c_while_waiting_does_not_take_files_from_under_the_thread(tmp_path):
    team = Team(Layout(), 0)
    object.__setattr__(team, "items", [None])
    object.__setattr__(team, "barrier_", threading.Barrier(1))
    saver = Saver(tmp_path, team, in_background=True)
    saver.save(1, partial(fill, team, pause=0.6))
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    saver.close()
    assert [c.step for c in checkpoints.find_checkpoints(tmp_path)[0]] == [1]
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_thread_is_not_lost(tmp_path):
    saver = Saver(tmp_path, in_background=True)
    saver.save(1, lambda _, work: work.do(lambda: 1 / 0))
    with pytest.raises(UserError, match=r"step 1: .* the thread that writes it has died"):
        saver.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_hosts_do_not_share_is_named(tmp_path):
    def run(team):
        output = tmp_path / ("here" if team.rank < 2 else "there")
        Saver(output, team).save(1, partial(fill, team))

    found = on_all_ranks(run)
    assert all("put output_dir on a file system that all hosts share" in str(e) for e in found)
    assert "rank 2 on" in str(found[0])


def test_the_final_model_of_several_ranks_replaces_an_older_one(tmp_path):
    (tmp_path / "model.safetensors").touch()
    on_all_ranks(lambda team: Saver(tmp_path, team).final(partial(fill, team)))
    assert len(find_tensors(tmp_path)) == 6 and not (tmp_path / "model.safetensors").exists()


def test_the_last_complete_one_stays_whatever_the_limit(tmp_path):
    def run(team):
        saver = Saver(tmp_path, team, limit=1, in_background=True)
        for step in (1, 2, 3):
            saver.save(step, partial(fill, team, broken=1 if step == 3 else None))
        saver.wait()

    assert "checkpoint-2" in str(on_all_ranks(run)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def overwrite(path, old, new):
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))


SHARD = "model-00003-of-00004.safetensors"
INCOMPLETE = {
    "a shard of the model": (lambda p: (p / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard cut off": (lambda p: os.truncate(p / SHARD, 99), f"{SHARD} has 99 of"),
    "a shard of the moments": (
        lambda p: (p / "optimizer-00002-of-00004.safetensors").unlink(),
        "optimizer-00002-of-00004.safetensors is missing",
    ),
    "a rank's generators": (
        lambda p: (p / "random_state-00003.json").unlink(),
        "random_state-00003.json is missing",
    ),
    "the index": (
        lambda p: (p / "model.safetensors.index.json").unlink(),
        "model.safetensors.index.json is missing",
    ),
    "the marker": (lambda p: (p / "complete.json").unlink(), "an interrupted save"),
    "half a marker": (lambda p: os.truncate(p / "complete.json", 20), "cannot be read"),
    "a marker of another kind": (
        lambda p: (p / "complete.json").write_text("{}"),
        r"cannot be read \('files'\)",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_an_incomplete_checkpoint_of_several_ranks_is_ignored_and_refused(tmp_path, what):
    damage, message = INCOMPLETE[what]
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoint-2")
    found, messages = checkpoints.find_resume(tmp_path, "true")
    assert found.step == 1 and len(messages) == 1
    with pytest.raises(UserError, match="checkpoint-2 is not complete: .*" + message):
        checkpoints.find_resume(tmp_path, str(tmp_path / "checkpoint-2"))


CORRUPT = {
    "a header": (
        lambda p: overwrite(p / SHARD, b'{"__metadata__"', b'["__metadata__"'),
        "damaged safetensors header",
    ),
    "a shape": (
        lambda p: overwrite(p / SHARD, b'"shape":[50]', b'"shape":[51]'),
        "do not hold F32 of shape",
    ),
    "a type": (
        lambda p: overwrite(p / SHARD, b'"dtype":"F32"', b'"dtype":"F31"'),
        "has type F31; supported",
    ),
    "a name": (
        lambda p: overwrite(p / SHARD, b"model.layers.", b"model.loyers."),
        "lacks tensor model.layers",
    ),
    "the index": (
        lambda p: (p / "model.safetensors.index.json").write_text("{"),
        "index.json is damaged",
    ),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_a_corrupt_file_of_one_rank_is_one_message(tmp_path, what):
    damage, message = CORRUPT[what]
    save(tmp_path, 1)
    damage(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=message):
        find_tensors(tmp_path / "checkpoint-1")
