"""The planner's formulas against other ways to the same figures."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from llm.llama.config import PRESETS, LlamaConfig
from llm.parallel.layout import Layout
from llm.planner import Workload, needs_offload, predict
from llm.planner.__main__ import read_recipe
from llm.planner.memory import layer_bytes, micro_batches_in_flight
from llm.planner.prediction import OUTSIDE, propose
from llm.planner.report import flags
from llm.planner.sizes import stage_sizes
from llm.planner.step import communication, stage_flops, step_seconds
from llm.planner.workload import DEVICES, hardware
from llm.train.figures import table_rate

REPO = Path(__file__).resolve().parents[3]
SHAPES = ("llama-7b", "llama-2-70b", "llama-3.2-1b")
HALF = Workload(1, 2, 128, "bfloat16", flash=True, fused_norm=True)


def sizes_of(shape, layout, lora_rank=0):
    stages = layout.stages(shape.num_hidden_layers)
    work = Workload(lora_rank=lora_rank)
    return [stage_sizes(shape, layout, stage, work) for stage in stages]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("pipeline", [1, 4])
def test_ranks_hold_the_whole_network(name, tensor, pipeline):
    shape = PRESETS[name]
    sizes = sizes_of(shape, Layout(tensor=tensor, pipeline=pipeline))
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    shared = shape.vocab_size * shape.hidden_size
    twice = shared if shape.tie_word_embeddings and pipeline > 1 else 0
    held = tensor * sum(size.total for size in sizes)
    assert held == shape.num_parameters + (tensor - 1) * norms + twice


def test_zero_is_that_of_the_paper():
    """Figure 1 of Rajbhandari et al. 2020: 7.5 billion weights over 64 ranks, in GB.

    Gradients are those of one rank's weights or of all; the paper's 16 bytes a weight are ours.
    """
    shape = LlamaConfig(32000, 4096, 12480, 32, 32, 32, 4096)
    assert shape.num_parameters == pytest.approx(7.5e9, rel=0.03)
    scale = 7.5e9 / shape.num_parameters
    for stage, expected in {0: 120.0, 1: 31.4, 2: 16.6}.items():
        layout = Layout(sharding=64 if stage else 1, sharding_stage=stage, data=1 if stage else 64)
        found = predict(shape, layout, HALF).worst
        total = found.parameters + found.gradients + found.optimizer
        assert total * scale / 1e9 == pytest.approx(expected, rel=0.05), stage


def test_a_rank_owns_whole_tensors():
    sizes = sizes_of(PRESETS["llama-2-7b"], Layout())[0]
    assert sizes.owned(1) == sizes.total
    for ranks in (2, 4, 64):
        assert sizes.total / ranks <= sizes.owned(ranks) <= sizes.total / ranks + max(sizes.trained)
    assert sizes.owned(10_000) == max(sizes.trained)


def test_ownership_is_that_of_the_updater():
    import paddle

    from llm.parallel.sharding import partition

    sizes = sizes_of(LlamaConfig(96, 32, 48, 6, 8, 4, 64), Layout())[0]
    parameters = []
    for index, size in enumerate(sizes.trained):
        parameter = paddle.zeros([size])
        parameter.name = f"weight {index}"
        parameters.append(parameter)
    owners = partition(parameters, 3)
    load = [0, 0, 0]
    for parameter in parameters:
        load[owners[parameter.name]] += parameter.size
    assert sizes.owned(3) == max(load)


@pytest.mark.parametrize("name", SHAPES)
def test_work_is_the_architectures(name):
    """Without recomputing, and with all scores computed, it is the count that MFU is made of."""
    shape = PRESETS[name]
    work = Workload(2, 4, 512, "bfloat16", flash=False)
    flops = stage_flops(shape, Layout(), work) / (2 * 512)
    # The architecture's count has norms among its matrices, which are not.
    norms = 6 * (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    assert flops == pytest.approx(shape.flops_per_token(512) - norms, rel=1e-9)
    split = stage_flops(shape, Layout(tensor=4), work)
    assert split * 4 == pytest.approx(stage_flops(shape, Layout(), work))
    again = stage_flops(shape, Layout(), work.replace(recompute="full"))
    head = 6 * shape.vocab_size * shape.hidden_size * 2 * 512
    assert again - head == pytest.approx((stage_flops(shape, Layout(), work) - head) * 4 / 3)


def held_by_1f1b(stages: int, micro_batches: int) -> list[int]:
    """Run the schedule of Narayanan et al. 2019 step by step; most forward passes kept by stage."""
    orders = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micro_batches)
        order = ["F"] * warm_up
        for _ in range(micro_batches - warm_up):
            order += ["F", "B"]
        orders.append(order + ["B"] * warm_up)
    most = []
    for order in orders:
        held = peak = 0
        for step in order:
            held += 1 if step == "F" else -1
            peak = max(peak, held)
        assert held == 0
        most.append(peak)
    return most


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 8), (4, 3), (4, 16), (8, 8)])
def test_micro_batches_in_flight(stages, micro_batches):
    layout = Layout(pipeline=stages)
    found = [micro_batches_in_flight(layout, stage, micro_batches) for stage in range(stages)]
    assert found == held_by_1f1b(stages, micro_batches)


def test_interleaving_holds_more_and_waits_less():
    plain, chunks = Layout(pipeline=4), Layout(pipeline=4, virtual_pipeline=2)
    assert chunks.bubble(8) < plain.bubble(8)
    assert micro_batches_in_flight(chunks, 0, 8) > micro_batches_in_flight(plain, 0, 8)
    assert micro_batches_in_flight(chunks, 0, 8) == (2 * 3 + 4 + 1) / 2


def test_recomputing_keeps_less_and_less():
    shape, layout = PRESETS["llama-2-7b"], Layout(tensor=2)
    work = Workload(1, 1, 2048, "bfloat16", flash=False, fused_norm=True)
    kept = [
        layer_bytes(shape, layout, work.replace(recompute=mode)).kept
        for mode in ("none", "core_attn", "full_attn", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    # The softmax in float32 and the copy that multiplies the values: 6 bytes a score.
    assert kept[0] - kept[1] == 6 * 16 * 2048 * 2048
    assert kept[3] == 2 * 2048 * 4096
    half = work.replace(recompute="full", recompute_layers=16)
    whole, some = (
        predict(shape, layout, work.replace(recompute="full")),
        predict(shape, layout, half),
    )
    assert some.bytes_per_rank > whole.bytes_per_rank


def test_sequence_parallelism_splits_the_stream():
    shape = PRESETS["llama-2-7b"]
    work = HALF.replace(recompute="full")
    whole = layer_bytes(shape, Layout(tensor=4), work).kept
    shared = layer_bytes(shape, Layout(tensor=4, sequence_parallel=True), work).kept
    assert shared == whole / 4


def test_communication_by_hand():
    shape = PRESETS["llama-2-7b"]
    work = Workload(2, 3, 1024, "bfloat16", flash=True)
    hidden = 2 * 1024 * 4096 * 2
    volume = communication(shape, Layout(tensor=4, pipeline=2, sharding=2, sharding_stage=1), work)
    assert volume["tensor"] == pytest.approx((4 * 16 + 2) * 2 * 0.75 * hidden * 3)
    assert volume["pipeline"] == 2 * hidden * 3
    weights = max(size.total for size in sizes_of(shape, Layout(tensor=4, pipeline=2)))
    assert volume["sharding"] == pytest.approx(0.5 * weights * 2 + 0.5 * weights * 2)
    assert set(volume) == {"tensor", "pipeline", "sharding"}
    (data,) = communication(shape, Layout(data=8), work).values()
    assert data == pytest.approx(2 * 7 / 8 * shape.num_parameters * 2)


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("per_machine", [8, 1])
def test_overlap_hides_what_computation_is_long_enough_for(passes, per_machine):
    """Beside one backward pass, or all of them, or one forward pass; as the trainer does it."""
    shape, device = PRESETS["llama-2-7b"], hardware("H100")
    work = HALF.replace(accumulation=passes, seq_length=4096, overlap=True)

    def seconds(**layout):
        return step_seconds(shape, Layout(**layout), work, device, per_machine)

    def sent(share):
        link = (450e9 if per_machine == 8 else 50e9) * 0.75
        return share * 7 / 8 * shape.num_parameters * 2 / link

    data = seconds(data=8)
    compute = data.products + data.memory
    backward, forward = compute / passes * 2 / 3, compute / passes / 3
    assert data.exposed == pytest.approx(max(0.0, sent(2) - backward))
    assert data.total == pytest.approx(data.in_turn - data.communication + data.exposed)
    left = [
        max(0.0, sent(1) - backward) + max(0.0, sent(1) - forward),
        max(0.0, passes * sent(1) - passes * backward) + max(0.0, sent(1) - forward),
        max(0.0, 3 * passes * sent(1) - compute),
    ]
    for stage, exposed in enumerate(left, start=1):
        found = seconds(sharding=8, sharding_stage=stage)
        assert found.exposed == pytest.approx(exposed, abs=1e-9), stage
    tensor = seconds(tensor=8)
    assert tensor.exposed == tensor.communication > 0, "the next product waits for these sums"


def test_overlap_takes_room_for_what_is_on_its_way():
    # Few words, so that most is taken by the layers going backward.
    shape = dataclasses.replace(PRESETS["llama-2-7b"], vocab_size=1000)
    work = HALF.replace(accumulation=4, seq_length=1024)
    more = []
    for stage in (1, 2, 3):
        layout = Layout(sharding=8, sharding_stage=stage)
        runs = [predict(shape, layout, work.replace(overlap=o)) for o in (0, 1)]
        more.append(runs[1].worst.total - runs[0].worst.total)
    largest = 2 * 4096 * 11008  # of a layer's gradients, in bytes
    buckets = 3 * 128 * 2**20 - largest
    layer = 2 * sum(a * b for a, b in shape.linears.values()) + 2 * 2 * 4096
    assert more == pytest.approx([0, buckets, buckets + layer * 7 / 8])


def test_overlapped_offload_takes_as_long_as_its_longest_part():
    shape, device = PRESETS["llama-2-7b"], hardware("H100")
    plain, away = (
        step_seconds(shape, Layout(), HALF.replace(offload=o, overlap=True), device)
        for o in (False, True)
    )
    one_way = 12 * shape.num_parameters / 64e9
    assert away.in_turn - plain.in_turn == pytest.approx(2 * one_way)
    assert away.total - plain.total == pytest.approx(one_way - plain.update)


def test_offload_takes_the_state_off_the_device():
    shape, layout = PRESETS["llama-2-7b"], Layout(tensor=8)
    plain, away = (predict(shape, layout, HALF.replace(offload=o)) for o in (False, True))
    state = plain.stages[0].optimizer
    assert state == pytest.approx(12 * shape.num_parameters / 8, rel=0.01)
    assert plain.bytes_per_rank - away.bytes_per_rank == round(state)
    assert needs_offload("static", away, 1e15) and not needs_offload("off", plain, 1.0)
    between = (plain.bytes_per_rank + away.bytes_per_rank) / 2 + OUTSIDE
    assert needs_offload("auto", plain, between) and not needs_offload("auto", away, between)


def test_adapters_have_gradients_and_frozen_weights_do_not():
    shape = PRESETS["llama-3.1-8b"]
    found = predict(shape, Layout(), HALF.replace(lora_rank=16)).worst
    # PEFT prints this number for rank 16 on all linears of Llama 3.1 8B.
    trained = 41_943_040
    sizes = sizes_of(shape, Layout(), 16)[0]
    assert sum(sizes.trained) == trained
    assert found.gradients <= 2 * trained and found.optimizer == 12 * trained
    assert found.parameters == 2 * (shape.num_parameters + trained)
    # Two ranks both hold A of q, k, v, gate and up, and B of o and down.
    inputs, outputs = 5 * 4096, 2 * 4096
    (half,) = sizes_of(shape, Layout(tensor=2), 16)
    assert 2 * sum(half.trained) == trained + 32 * 16 * (inputs + outputs)


def test_a_proposal_is_a_run_that_fits():
    shape, device = PRESETS["llama-2-7b"], hardware("A100")
    fused = {"flash": True, "fused_norm": True, "fused_swiglu": True, "chunk_numbers": 2**28}
    work = Workload(1, 16, 4096, "bfloat16", **fused)
    start = Layout(data=8)
    assert not predict(shape, start, work).fits(80e9)
    found = propose(shape, start, work, device, device_bytes=80e9)
    seconds = [one.seconds.total for one in found]
    assert len(found) > 5 and seconds == sorted(seconds)
    for one in found:
        assert one.fits(80e9) and one.layout.world_size == 8
        assert one.tokens_per_step == 16 * 8 * 4096
    words = [str(REPO / "configs/pretrain_llama2_7b_8gpu.yaml"), *flags(found[0]).split()]
    again = read_recipe([*words, "--fp16_opt_level", "O2", "--amp_master_grad", "false"])
    assert again.layout == found[0].layout
    asked = again.work.replace(eval_batch=0)  # the recipe evaluates, the workload above does not
    assert asked == found[0].work.replace(accumulation=again.work.accumulation)


def test_less_memory_never_fits_more():
    shape, device = PRESETS["llama-2-13b"], hardware("A100")
    work = Workload(1, 16, 4096, "bfloat16", flash=True, fused_norm=True)
    counts = [
        len(propose(shape, Layout(data=16), work, device, device_bytes=size * 1e9))
        for size in (10, 40, 80)
    ]
    assert counts[0] == 0 < counts[1] < counts[2]


def test_peaks_are_those_that_mfu_is_relative_to():
    for name in ("H100", "H200", "A100", "A800", "L40S", "V100", "H20", "H800"):
        assert DEVICES[name].half == table_rate(f"NVIDIA {name}").flops_per_second


def run_planner(*words):
    command = [sys.executable, "-m", "llm.planner", *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


def test_the_program_prints_a_plan_and_writes_it(tmp_path):
    file = tmp_path / "plan.json"
    done = run_planner("configs/pretrain_llama2_13b_16gpu.yaml", "--plan_file", str(file))
    assert done.returncode == 0, done.stderr
    for words in ("bubble", "sent by a rank", "s/update", "the first one's flags"):
        assert words in done.stdout
    asked = json.loads(file.read_text())["asked"]
    recipe = read_recipe([str(REPO / "configs/pretrain_llama2_13b_16gpu.yaml")])
    assert (
        asked["bytes_per_rank"] == predict(recipe.shape, recipe.layout, recipe.work).bytes_per_rank
    )
    assert len(asked["stages"]) == 2


def test_the_program_refuses_what_cannot_fit():
    done = run_planner("configs/pretrain_llama2_7b_8gpu.yaml", "--gpu_memory", "20")
    assert done.returncode == 2
    assert "does not fit" in done.stderr and "20.0 GB" in done.stderr
    assert re.search(r"the largest part: \w+, [\d.]+ GB", done.stderr)
    assert "layouts that fit" in done.stdout
    done = run_planner("configs/pretrain_llama2_7b_8gpu.yaml", "--gpu_memory", "5")
    assert done.returncode == 2 and "no layout of these GPUs fits" in done.stderr


def test_the_program_needs_no_paddle():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['plan', 'configs/pretrain_tiny_tp2pp2_cpu.yaml']\n"
        "runpy.run_module('llm.planner', run_name='__main__')\n"
        "assert 'paddle' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "a rehearsal on CPUs" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tensor_parallel_degree", "3"], "does not divide the model's num_key_value_heads=32"),
        (["--gpus", "12"], "does not make up the 6 replicas"),
        (["--gpu", "TPU"], "gpu='TPU' is not one of H100"),
        (["--sharding", "stage4"], "stage4"),
        (["--tensor_paralel_degree", "3"], "did you mean 'tensor_parallel_degree'"),
        (["--max_seq_length", "4095"], "multiple of 2"),
        (["--model_name_or_path", "none"], "model_name_or_path is missing"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        read_recipe([str(REPO / "configs/pretrain_llama2_7b_8gpu.yaml"), *words])


def test_finetuning_recipes_are_recognised():
    path = str(REPO / "configs/finetune_llama3.1_8b_lora_gpu.yaml")
    found = read_recipe([path, "--model_name_or_path", "llama-3.1-8b"])
    assert found.work.lora_rank == 16 and found.work.lora_dropout
    assert found.work.seq_length == 4096
    longer = read_recipe([path, "--model_name_or_path", "llama-3.1-8b", "--packing", "false"])
    assert longer.work.seq_length == 2048 + 1024


def test_unknown_values_are_refused():
    with pytest.raises(UserError, match="precision='int8' is not one of float32"):
        Workload(precision="int8")
    with pytest.raises(UserError, match="recompute='some'"):
        Workload(recompute="some")
    with pytest.raises(UserError, match="is not one of H100"):
        hardware("B100")


@pytest.mark.parametrize("built", [True, False])
def test_weights_are_kept_only_where_attention_is_not_native(monkeypatch, built):
    """The native kernel keeps two numbers per row and head, the tiled form half of the scores."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (object() if built else None) if name == "llama_paddle_ops" else find(name),
    )
    words = "--model_name_or_path llama-3.2-1b --input_dir x --output_dir y --device cpu"
    words += " --max_seq_length 1024 --use_flash_attention true"
    recipe = read_recipe(words.split())
    assert recipe.work.tiled is not built
    whole = layer_bytes(recipe.shape, Layout(), recipe.work).full
    without = layer_bytes(recipe.shape, Layout(), recipe.work.replace(flash=False)).full
    rows = recipe.shape.num_attention_heads * recipe.work.micro_batch * 1024
    kept = 8 if built else 4 * (1024 + 128) / 2
    assert without - whole == pytest.approx(rows * (4 * 1024 - kept))
