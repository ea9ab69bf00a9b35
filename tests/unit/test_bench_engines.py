"""What the benchmarks of whole engines compute beside the clock."""

import importlib
import sys
from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture(scope="module")
def parts(repo):
    """``parts(name)``: a module of benchmarks/, which import each other as scripts do."""
    sys.path.insert(0, str(repo / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(repo / "benchmarks"))


class OneEach:
    """Gives every request a token a step."""

    vocabulary = 100

    def __init__(self):
        self.left, self.most, self.steps, self.prompts = {}, 0, 0, []

    def add(self, ids, new):
        self.prompts.append(ids)
        self.left[len(self.prompts)] = new
        return len(self.prompts)

    def step(self):
        self.most = max(self.most, len(self.left))
        self.steps += 1
        got = dict.fromkeys(self.left, 1)
        self.left = {key: left - 1 for key, left in self.left.items() if left > 1}
        return got


def test_clients_ask_again_when_their_answer_is_there(parts):
    engines = parts("generation_engines")
    engine = OneEach()
    requests = [engines.Asked([1], new) for new in (3, 5, 2, 4)]
    engines.drive(engine, requests, 2)
    assert [len(one.came) for one in requests] == [3, 5, 2, 4]
    assert engine.most == 2
    assert engine.steps == 9  # 3, then 2 and 4 on one side; 5 on the other
    assert all(one.began <= one.came[0] for one in requests)


def test_what_comes_late_takes_nobodys_place(parts):
    engines = parts("generation_engines")
    engine = OneEach()
    requests = [engines.Asked([1], 4) for _ in range(4)]
    late = [engines.Asked([2], 3)]
    engines.drive(engine, requests, 2, lambda number: late if number == 1 else [])
    assert engine.most == 3
    assert engine.steps == 8
    assert len(late[0].came) == 3


@pytest.mark.parametrize("name", ["8 clients", "24 clients", "prefix, together", "pauses, 24"])
def test_loads_draw_new_prompts_each_turn(parts, name):
    engines = parts("generation_engines")
    first, again, other = OneEach(), OneEach(), OneEach()
    figures = [engines.LOADS[name](one, seed) for one, seed in ((first, 1), (again, 1), (other, 2))]
    assert first.prompts == again.prompts
    assert not {tuple(ids[:32]) for ids in first.prompts} & {tuple(i[:32]) for i in other.prompts}
    assert all(value > 0 for value in figures[0].values())
    assert all(max(ids) < OneEach.vocabulary for ids in first.prompts)


def test_prompts_of_the_prefix_load_share_their_beginning(parts):
    engine = OneEach()
    parts("generation_engines").LOADS["prefix, 8 at a time"](engine, 1)
    assert engine.most == 8
    assert {len(ids) for ids in engine.prompts} == {1032}
    assert len({tuple(ids[:1000]) for ids in engine.prompts}) == 1
    assert len({tuple(ids[1000:]) for ids in engine.prompts}) == 16


def test_logits_and_log_probabilities_are_compared_alike(parts):
    bench, shared = parts("bench_generation"), parts("generation_models")
    logits = np.random.default_rng(0).standard_normal((shared.CHECKED, 50)).astype(np.float32)
    ids = shared.prompt(50)[shared.PROMPT - shared.CHECKED : shared.PROMPT]
    logs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1))[:, None]
    told = np.concatenate([[0.0], logs[np.arange(len(ids) - 1), ids[1:]]])
    assert bench.distance(logits, logits) == 0
    assert bench.distance(told, logits) < 1e-5
    assert bench.distance(np.roll(told, 1), logits) > 0.5
    assert bench.distance(np.roll(logits, 1, 0), logits) > 0.5


def test_a_cell_compares_with_the_best_peer_of_the_same_turns(parts):
    bench = parts("bench_generation")
    speeds = {"dygraph": [10.0, 20, 30], "mapped": [11.0, 22, 33], "vLLM": [5.0, 10, 60]}
    row = bench.row_of(speeds | {"OpenVINO": [9.0, 30, 30]}, [1e9] * 3, 50_000_000)
    assert row["times_best"]["dygraph"] == ["OpenVINO", 1.0]
    assert row["times_peers"]["dygraph"] == {"vLLM": 2.0, "OpenVINO": 1.0}
    assert row["times_dygraph"] == {"mapped": 1.1}
    assert row["share_of_bound"] == {"dygraph": 1.0, "mapped": 1.1}
    assert row["range"]["dygraph"] == [10, 30]


def test_loads_compare_pauses_the_other_way_round(parts):
    loads = parts("engine_peers")
    turns = {"engine": [{"worst_pause": 1.0}] * 3, "vLLM": [{"worst_pause": 3.0}] * 3}
    assert loads.row_of("pauses, 24", turns)["times_best"] == ["vLLM", 3.0]


def test_a_peer_that_is_not_there_is_named(parts, monkeypatch, tmp_path, capsys):
    peers = parts("generation_peers")
    away = replace(peers.PEERS["vLLM"], place=str(tmp_path))
    monkeypatch.setitem(peers.PEERS, "vLLM", away)
    assert peers.installed(["vLLM"]) == {}
    assert (
        "vLLM is left out: it is not installed (make .venv-vllm/.done)" in capsys.readouterr().out
    )


def test_a_peer_that_does_not_start_is_named(parts, tmp_path, capsys):
    peers = parts("generation_peers")
    words = [sys.executable, "-c", "raise SystemExit('no such kernel here')"]
    assert peers.start("vLLM int4", words, 1, tmp_path / "log") is None
    said = capsys.readouterr().out
    assert "vLLM int4 is left out" in said
    assert "no such kernel here" in said
    with pytest.raises(SystemExit, match="no such kernel"):
        peers.start("dygraph int4", words, 1, tmp_path / "log")


def test_shapes_with_fewer_layers(parts):
    shared = parts("generation_models")
    whole, few = shared.sizes_of("1.1B"), shared.sizes_of("1.1B/4")
    assert few == whole | {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=r"'1\.2B' is not one of 1\.1B"):
        shared.sizes_of("1.2B")
