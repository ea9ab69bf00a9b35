"""Every figure that a script prints has a row: what it rests on, and the test that holds it.

A figure is a formatted number in what the suite says, outside of its errors. A new one fails here
until it has a row.
"""

import ast
import math
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from llm.evaluation import choices
from llm.evaluation.quantized import rounding_note
from llm.llama.quant_config import QuantConfig
from llm.train.preference import ROUNDING, DPOObjective
from paddlenlp_ext.callbacks import duration
from scripts import tree
from tests.unit.test_pages import REPO, definitions

PLANNER = "tests/unit/planner/test_planner.py"
TRAINER = "tests/unit/paddlenlp_ext/test_trainer.py"
FINETUNE = "tests/unit/train/test_finetune_plan.py"
PRETRAIN = "tests/unit/train/test_pretrain_plan.py"
BLENDS = (
    "tests/unit/train/test_pretrain_blends.py"
    "::test_a_run_takes_its_shares_of_each_store_in_the_stores_own_order"
)
GUIDE = "tests/unit/parallel/test_parallel_guide.py"
SHAPES = "tests/unit/llama/test_llama_config.py::test_published_sizes"
PAGES = "tests/pages/test_running.py::test_it_runs"
QUANTIZED = "tests/e2e/test_quantize.py::test_figures_are_printed_and_stored"
HERE = "tests/unit/test_printed_figures.py"
CLOCK = "this process's clock, from the first read to the last write"
SPEEDS = "an estimate from data sheets, as docs/parallel.md says; near what others published"
PUBLISHED = f"{GUIDE}::test_published_layouts_of_nvidia"
MEMORY = "tests/distributed/test_memory.py::test_odd_shapes_and_adapters_take_what_is_predicted"
ALLOCATED = "bytes that paddle's allocator counts, within 3 % in one process and 10 % in several"
STEPS = "the updates since the last line, whose time is without evaluations and saves"

# By file and expression, as Python writes it: what it rests on, and the test.
FIGURES: dict[tuple[str, str], tuple[str, str]] = {
    ("data/prepare.py", "progress.input_bytes / seconds / 1000000.0"): (
        "bytes of the files that were read, by this run alone: none is given where it went on",
        "tests/unit/data/test_prepare.py::test_a_stopped_run_goes_on_to_the_same_bytes",
    ),
    ("data/prepare.py", "seconds"): (CLOCK, PAGES),
    ("llm/llama/packed_cache.py", "size / 1000000.0"): (
        "bytes of the tensors in the file, without its header",
        "tests/unit/llama/test_packed_cache.py::test_places",
    ),
    ("data/merge.py", "time.perf_counter() - begin"): (CLOCK, PAGES),
    ("data/prepare_instruct.py", "time.perf_counter() - begin"): (CLOCK, PAGES),
    **dict.fromkeys(
        (
            ("demo.py", "train.stat().st_size / 1000000.0"),
            ("demo.py", "time.perf_counter() - demo.started"),
            ("demo.py", "elapsed"),
            ("demo.py", "before"),
            ("demo.py", "after"),
            ("demo.py", "untuned"),
            ("demo.py", "tuned"),
        ),
        ("held-out text and 100 held-out questions, by the scripts' own measures", PAGES),
    ),
    **dict.fromkeys(
        (("llm/engine/verify.py", "self.difference"), ("llm/engine/verify.py", "self.tolerance")),
        (
            "all logits of the check's tokens, as a share of the largest; the limit beside it",
            "tests/unit/engine/test_verify.py::test_good_exports_pass",
        ),
    ),
    ("llm/engine/opening.py", "adapter …: … MiB"): (
        "an adapter's numbers in memory, padded for the kernels",
        "tests/unit/engine/test_adapters.py::test_bytes_are_stated",
    ),
    ("llm/engine/opening.py", "runner.block_bytes / 1000.0"): (
        "keys and values of a cache block in all layers, on one process",
        "tests/unit/engine/test_cache_types.py::test_memory_of_a_block",
    ),
    ("external_ops/capability.py", "far"): (
        "the largest difference from the reference in float32, over the largest number",
        "tests/unit/external_ops/test_capability.py::test_what_a_form_does_not_do_is_said",
    ),
    ("llm/planner/operators.py", "1000.0 * one"): (
        "an estimate from counted operators, bytes and FLOPs, as docs/devices.md says",
        "tests/unit/planner/test_operators.py::test_the_guide_has_the_tables",
    ),
    ("export_generation_model.py", "time.perf_counter() - begin"): (CLOCK, PAGES),
    ("external_ops/llama_paddle_ops/__main__.py", "worst"): (
        "the same computation in NumPy, float64",
        "tests/unit/external_ops/test_building.py::test_the_self_check_runs_every_operator_at_every_level",
    ),
    ("llm/llama/config.py", "self.rope_scaling.factor"): (
        "the model's config",
        "tests/unit/llama/files/test_spare_tensors.py::test_context",
    ),
    ("llm/llama/files/dtypes.py", "extreme"): (
        "the tensor's largest number",
        "tests/unit/llama/files/test_finite.py::test_a_weight_that_float16_cannot_hold",
    ),
    ("llm/llama/files/spare.py", "config.rope_theta"): (
        "the model's config",
        "tests/unit/llama/files/test_spare_tensors.py::test_named_once",
    ),
    **dict.fromkeys(
        (
            ("llm/evaluation/quantized.py", "before"),
            ("llm/evaluation/quantized.py", "after"),
            ("llm/evaluation/quantized.py", "100 * (after / before - 1)"),
        ),
        ("bytes of the linears; perplexity on this run's kernels, which a line names", QUANTIZED),
    ),
    **dict.fromkeys(
        (("llm/evaluation/report.py", "value"),),
        (
            "the whole file or --limit of it; the JSON has settings, kernels, versions and commit",
            "tests/unit/evaluation/test_evaluate_script.py"
            "::test_the_script_reports_figures_and_settings",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/evaluation/exam_report.py", "figures['acc']"),
            ("llm/evaluation/exam_report.py", "figures['acc_of_subjects']"),
            ("llm/evaluation/exam_report.py", "figures['subjects']"),
            ("llm/evaluation/exam_report.py", "figures['total']"),
            ("llm/evaluation/exam_report.py", "means['all']['acc']"),
            ("llm/evaluation/exam_report.py", "means[category]['acc']"),
            ("llm/evaluation/exam_report.py", "cut"),
            ("llm/evaluation/exam_report.py", "scored"),
        ),
        (
            "all questions of the subjects that the table lists, or --limit of each",
            "tests/unit/evaluation/test_exams.py::test_a_table_by_hand",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/evaluation/question_report.py", "value"),
            ("llm/evaluation/question_report.py", "length"),
            ("llm/evaluation/question_report.py", "depth"),
        ),
        (
            "all needles of that length and depth; the JSON has each with its answer",
            "tests/unit/evaluation/test_needle.py::test_a_table_by_hand",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/llama/files/comparing.py", "one.error"),
            ("llm/llama/files/comparing.py", "one.cost"),
            ("llm/llama/files/comparing.py", "one.limit"),
        ),
        (
            "64 random tokens, layer by layer in float32; what rounding costs, and may",
            "tests/unit/llama/files/test_comparing.py::test_what_blocks_cost_is_said_and_within_its_limit",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/planner/prediction.py", "self.bytes_per_rank / size"),
            ("llm/planner/prediction.py", "amount / size"),
            ("llm/planner/report.py", "amount / 1000000000.0"),
            ("paddlenlp_ext/trainer.py", "memory of tensors: … MB a rank at most"),
        ),
        (ALLOCATED, MEMORY),
    ),
    ("llm/planner/report.py", "shape.num_parameters / 1000000000.0"): ("the shape", SHAPES),
    ("llm/planner/report.py", "shape.flops_per_token(work.seq_length) / 1000000000.0"): (
        "every product once, of forward and backward pass",
        "tests/unit/llama/test_llama_config.py::test_flops_count_every_product_once",
    ),
    ("llm/planner/report.py", "found.tokens_per_step"): (
        "flags",
        f"{PLANNER}::test_a_proposal_is_a_run_that_fits",
    ),
    **dict.fromkeys(
        (
            ("llm/planner/report.py", "found.bubble"),
            ("llm/planner/report.py", "one.bubble"),
            ("llm/train/checks.py", "layout.bubble(batches)"),
        ),
        (
            "the schedule's length",
            "tests/unit/parallel/test_layout.py::test_the_bubble_of_the_schedule",
        ),
    ),
    **dict.fromkeys(
        (
            *(
                ("llm/planner/report.py", f"seconds.{part}")
                for part in ("total", "products", "memory", "bubble", "communication", "update")
            ),
            ("llm/planner/report.py", "seconds.in_turn"),
            ("llm/planner/report.py", "found.tokens_per_second"),
            ("llm/planner/report.py", "one.tokens_per_second"),
            ("llm/planner/report.py", "one.seconds.total"),
            ("llm/planner/report.py", "utilization(found, hardware)"),
            ("llm/planner/report.py", "utilization(one, hardware)"),
        ),
        (SPEEDS, PUBLISHED),
    ),
    **dict.fromkeys(
        (
            ("llm/planner/report.py", "seconds.overlapped"),
            ("llm/planner/report.py", "seconds.exposed"),
        ),
        (
            "the time of communication beyond the computation that it runs beside",
            f"{PLANNER}::test_overlap_hides_what_computation_is_long_enough_for",
        ),
    ),
    ("llm/serving/rates.py", "rest"): (
        "when the oldest of the minute's requests leaves it",
        "tests/unit/serving/test_rates.py::test_duration",
    ),
    ("llm/serving/batch_client.py", "self._timeout_s"): (
        "the flag that it names",
        "tests/unit/serving/test_batch.py::test_a_server_is_asked_again_where_it_turns_away_for_now",
    ),
    ("llm/config/paddlenlp_training.py", "rate"): (
        "the flag's own default",
        "tests/unit/config/test_published.py::test_the_same_words_that_mean_something_else_are_said",
    ),
    ("llm/llama/gguf_config.py", "value"): (
        "the shortest decimal number that the file's float32 is the nearest to",
        "tests/unit/llama/files/test_gguf.py::test_networks_compute_what_the_directory_s_do",
    ),
    **dict.fromkeys(
        (
            ("llm/serving/terminal.py", "seconds"),
            ("llm/serving/terminal.py", "generated / max(seconds, 1e-09)"),
        ),
        ("tokens of all answers and the time of generating them, prompts included", PAGES),
    ),
    ("llm/train/checkpoints.py", "best so far: eval_… … at step …"): (
        "an evaluation's own figure",
        "tests/unit/paddlenlp_ext/test_finetuning.py::test_the_best_model_is_the_final_one",
    ),
    ("paddlenlp_ext/trainer.py", "best model: … (…)"): (
        "an evaluation's own figure",
        "tests/unit/paddlenlp_ext/test_finetuning.py::test_the_best_model_is_the_final_one",
    ),
    ("llm/train/checks.py", "consumed"): (
        "samples before the checkpoint",
        f"{PRETRAIN}::test_resuming_with_another_batch_goes_on_at_the_next_sample",
    ),
    **dict.fromkeys(
        (
            ("llm/train/resuming.py", "old"),
            ("llm/train/resuming.py", "new"),
        ),
        (
            "the schedule of the checkpoint's settings, and this run's",
            f"{PRETRAIN}::test_a_run_is_extended_past_its_passes",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/train/pretrain_data.py", "length"),
            ("llm/train/pretrain_data.py", "share"),
            ("llm/train/pretrain_data.py", "count"),
            ("llm/train/pretrain_data.py", "count * seq_length"),
            ("llm/train/pretrain_data.py", "store.num_tokens"),
            ("data/corpus/sources.py", "share"),
        ),
        ("the weights, and what the mixture gives of each store", BLENDS),
    ),
    ("llm/train/pretrain_data.py", "consumed"): (
        "samples before the checkpoint",
        "tests/unit/train/test_pretrain_blends.py"
        "::test_a_run_that_has_ended_goes_on_with_other_data",
    ),
    ("llm/train/pretrain_data.py", "beyond"): (
        "samples of this run, less those that were laid out before",
        f"{PRETRAIN}::test_a_run_is_extended_past_its_passes",
    ),
    ("llm/train/figures.py", "self.flops_per_second / 1000000000.0"): (
        "a data sheet, or products timed here and now: the line says which",
        "tests/unit/train/test_figures.py::test_a_measured_peak_is_measured_again",
    ),
    **dict.fromkeys(
        (
            ("llm/train/finetune.py", "trained"),
            ("llm/train/finetune.py", "total"),
            ("llm/train/finetune.py", "trained / total"),
        ),
        (
            "parameters of this process's part, and the line says where that is not all",
            "tests/unit/paddlenlp_ext/test_finetuning.py"
            "::test_frozen_weights_have_no_gradients_and_no_optimizer_state",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/train/finetune_plan.py", "len(train)"),
            ("llm/train/finetune_plan.py", "len(packed)"),
            ("llm/train/finetune_plan.py", "packed.fill"),
        ),
        ("the data", "tests/unit/data/test_packing.py::test_packed_rows"),
    ),
    ("llm/train/finetune_plan.py", "plan.config.num_parameters / 1000000.0"): ("the shape", SHAPES),
    **dict.fromkeys(
        (
            ("llm/train/finetune_plan.py", "len(plan.train)"),
            ("llm/train/finetune_plan.py", "tokens"),
            ("llm/train/finetune_plan.py", "labels"),
            ("llm/train/finetune_plan.py", "plan.max_steps"),
            ("llm/train/finetune_plan.py", "samples / len(plan.train)"),
        ),
        (
            "the data; both rows of a pair",
            f"{FINETUNE}::test_the_summary_counts_both_sides_of_pairs",
        ),
    ),
    ("llm/train/pretrain_plan.py", "parameters / 1000000.0"): ("the shape", SHAPES),
    **dict.fromkeys(
        (
            ("llm/train/pretrain_plan.py", "plan.data_state['num_documents']"),
            ("llm/train/pretrain_plan.py", "plan.data_state['num_tokens']"),
            ("llm/train/pretrain_plan.py", "plan.max_steps"),
            ("llm/train/pretrain_plan.py", "tokens"),
            ("llm/train/pretrain_plan.py", "samples * data.max_seq_length"),
        ),
        (
            "the store; of a resumed run, what it took before as well",
            f"{PRETRAIN}::test_the_summary_counts_what_the_run_takes",
        ),
    ),
    **dict.fromkeys(
        (
            ("paddlenlp_ext/callbacks.py", "logs['loss']"),
            ("paddlenlp_ext/callbacks.py", "logs['learning_rate']"),
            ("paddlenlp_ext/callbacks.py", "logs['tokens_per_second']"),
            ("paddlenlp_ext/callbacks.py", "norm"),
        ),
        (STEPS, f"{TRAINER}::test_logged_figures_are_those_of_the_steps"),
    ),
    ("paddlenlp_ext/callbacks.py", "logs['peak_memory_gb']"): (
        "resident memory of the process on a CPU, paddle's allocator on a GPU",
        f"{TRAINER}::test_logged_figures_are_those_of_the_steps",
    ),
    ("paddlenlp_ext/callbacks.py", "logs['mfu']"): (
        "the peak that the log names; absent where it would be above it",
        "tests/unit/train/test_figures.py::test_a_data_sheet_is_not_measured",
    ),
    ("paddlenlp_ext/callbacks.py", "v"): (
        "every label, or pair, of the part that is evaluated",
        f"{TRAINER}::test_evaluation_weighs_tokens_and_gives_perplexity",
    ),
    **dict.fromkeys(
        (
            ("llm/llama/merging.py", "self.largest"),
            ("llm/llama/merging.py", "math.sqrt(self.squares / max(self.of_weights, 1e-300))"),
            ("llm/llama/merging.py", "math.sqrt(self.squares / self.of_products)"),
        ),
        (
            "every weight that the adapter has changed",
            "tests/unit/llama/adapters/test_frozen_base.py::test_the_count_of_losses",
        ),
    ),
    **dict.fromkeys(
        (
            ("llm/parallel/gloo/rounds.py", "link.gettimeout()"),
            ("llm/parallel/sentry.py", "self.timeout_s"),
            ("llm/parallel/sentry.py", "LOST_S"),
        ),
        (
            "the limit itself, in messages of a job that ends",
            f"{HERE}::test_every_figure_has_a_row",
        ),
    ),
}
_LOGGED = re.compile(r"%[+0-9]*\.[0-9]+[fge]")
_NUMBER = re.compile(r"[feg%,]")


def _figures_of(name: str) -> set[tuple[str, str]]:
    """Return the figures that a file prints: formatted numbers, and logged lines that have some."""
    parsed = ast.parse((REPO / name).read_text(encoding="utf-8"))
    errors = {
        id(inner)
        for node in ast.walk(parsed)
        if isinstance(node, ast.Raise)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(parsed):
        if id(node) in errors:
            continue
        if isinstance(node, ast.FormattedValue) and isinstance(node.format_spec, ast.JoinedStr):
            spec = "".join(
                str(p.value) for p in node.format_spec.values if isinstance(p, ast.Constant)
            )
            if _NUMBER.search(spec):
                found.add((name, ast.unparse(node.value)))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            text = node.args[0].value
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if method in ("info", "warning", "log") and _LOGGED.search(str(text)):
                found.add((name, re.sub(r"%[+0-9.]*[a-z]", "…", str(text)).partition(",")[0]))
    return found


@cache
def printed() -> frozenset[tuple[str, str]]:
    """Return the figures of everything that ships."""
    shipped = ("common/", "data/", "external_ops/", "llm/", "paddlenlp_ext/")
    names = [
        n for n in tree.files() if n.endswith(".py") and ("/" not in n or n.startswith(shipped))
    ]
    return frozenset(figure for name in names for figure in _figures_of(name))


def _in_errors_alone(figure):
    """Messages that are put together before they are raised."""
    return figure[0].startswith(("common/", "llm/llama/files/conversion.py"))


def test_every_figure_has_a_row():
    missing = {figure for figure in printed() if not _in_errors_alone(figure)} - set(FIGURES)
    assert sorted(missing) == []
    assert sorted(set(FIGURES) - printed()) == []


def test_every_row_names_a_test():
    for rests_on, test in FIGURES.values():
        file, _, name = test.partition("::")
        assert rests_on and name in definitions(REPO / file), test


# --- figures that could not be --------------------------------------------------------------------


def test_the_time_left_has_days():
    assert duration(59.6) == "00:01:00"
    assert duration(3661) == "01:01:01"
    assert duration(86400 * 2 + 60) == "2 d 00:01:00"


def test_one_question_has_no_standard_error():
    class Sure:
        def loglikelihood(self, pairs):
            return [SimpleNamespace(logprob=-float(number)) for number, _ in enumerate(pairs)]

    class Letters:
        bos_id = None

        def encode(self, text, **_):
            return [ord(letter) for letter in text]

    one = [choices.Item("q", ("a", "b"), 0)]
    got = choices.score(Sure(), Letters(), one, add_bos=False)
    assert got["acc"] == 1.0 and not any(name.endswith("stderr") for name in got)
    got = choices.score(Sure(), Letters(), one * 2, add_bos=False)
    assert math.isfinite(got["acc_stderr"])


@pytest.mark.parametrize(("moved", "share"), [(1e-6, 0.0), (-1e-6, 0.0), (1e-4, 0.5)])
def test_rounding_makes_no_pair_better(moved, share):
    """Two pairs before the first update: log-probabilities that differ as other batches make it."""
    reference = np.asarray([-100.0, -50.0, -90.0, -70.0], np.float32)
    policy = (reference * (1 - np.asarray([moved, moved, 0, moved]))).astype(np.float32)
    figures = DPOObjective()._figures(policy, reference, 2)
    assert figures["rewards_accuracy"][0] / 2 == share
    assert abs(moved) < ROUNDING or share


@pytest.mark.parametrize("bits", [None, 8])
def test_rounded_inputs_name_the_kernels(bits, monkeypatch):
    from llm.evaluation import quantized

    network = SimpleNamespace(ops=SimpleNamespace(choices=[SimpleNamespace(op="o", form="native")]))
    config = QuantConfig(8, activation_bits=bits)
    monkeypatch.setattr(quantized, "quantization_of", lambda _: config)
    note = rounding_note(network)
    assert (note is None) == (bits is None)
    assert note is None or ("o native" in note and "--ops" in note)
    assert rounding_note(None) is None
