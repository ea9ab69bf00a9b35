"""The one door: what can be opened, and what can be done with it; the table of docs/model.md."""

import dataclasses
import io
import json
import re
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.flags import load
from data.tokenizer import load_tokenizer
from external_ops import native
from external_ops.backend import select_ops
from external_ops.modes import OPS
from llm.config.generation import OpenArguments
from llm.config.scripts import SCRIPTS
from llm.config.serving import ServerArguments
from llm.engine.finding import find_model
from llm.engine.opening import open_model, open_network, open_weights
from llm.engine.request import Request, SamplingParams, requests
from llm.engine.texts import generate_texts
from llm.evaluation.scorer import open_scorer
from llm.evaluation.tasks import read_tasks
from llm.llama import build
from llm.llama.adapters.base_record import BaseRecord
from llm.llama.adapters.lora import LoRAConfig, add_lora, save_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, save_prefix
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import is_quantized, quantize_model
from llm.serving.service import open_served

REPO = Path(__file__).resolve().parents[3]
TEXT = "The token store keeps ids, and the engine asks for blocks. " * 4
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)

# Flags that name each model; {root} is where the fixture put it.
OPENED = {
    "model directory": ("--model_name_or_path", "{root}/model"),
    "PaddleNLP's rank files": ("--model_name_or_path", "{root}/ranks"),
    "bfloat16": ("--model_name_or_path", "{root}/model", "--dtype", "bf16"),
    "W8, A8W8": ("--model_name_or_path", "{root}/A8W8"),
    "W4, A8W4": ("--model_name_or_path", "{root}/W4"),
    "LoRA adapter": ("--model_name_or_path", "{root}/model", "--lora_path", "{root}/lora"),
    "tuned prefix": ("--model_name_or_path", "{root}/model", "--prefix_path", "{root}/prefix"),
    "export": ("--model_dir", "{root}/program"),
}
USES = ("answer", "serve", "evaluate", "export", "merge", "quantize")
# What is refused, and what the message says; everything else works.
REFUSED = {
    ("tuned prefix", "export"): "prefix_path cannot be exported",
    ("model directory", "merge"): "--lora_path is needed",
    ("PaddleNLP's rank files", "merge"): "--lora_path is needed",
    ("bfloat16", "merge"): "--lora_path is needed",
    ("W8, A8W8", "merge"): "--lora_path is needed",
    ("W4, A8W4", "merge"): "--lora_path is needed",
    ("tuned prefix", "merge"): "prefix_path: a prefix is keys and values before every sequence",
    ("export", "merge"): "model_dir: an exported program takes no adapter",
    ("bfloat16", "quantize"): "dtype: what is not rounded keeps the type",
    ("W8, A8W8", "quantize"): "is quantized already; .* or widen it with --dequantize true",
    ("W4, A8W4", "quantize"): "is quantized already",
    ("LoRA adapter", "quantize"): "lora_path: quantize the merged model; merge_lora.py makes it",
    ("tuned prefix", "quantize"): "prefix_path: a prefix belongs to the weights",
    ("export", "quantize"): "model_dir: an exported program cannot be quantized",
    ("export", "export"): "model_dir: that is an exported program already",
}
NEEDS_NATIVE = ("bfloat16",)


def stir(model, part, scale):
    rng = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        if part in name:
            drawn = rng.standard_normal(parameter.shape, dtype=np.float32)
            parameter.set_value(drawn * np.float32(scale))
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One model in every form that can be opened."""
    root = tmp_path_factory.mktemp("door")
    config = load_config(TINY_NAME).replace(max_position_embeddings=512)
    model = build_model(config, seed=5)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 6)
    save_model(model, root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    convert(open_checkpoint(root / "model"), root / "ranks", layout=RankLayout(2, 2))
    for kind, groups in (("A8W8", None), ("W4", 8)):
        config = QuantConfig.of_type(kind, groups)
        save_model(quantize_model(load_model(root / "model"), config), root / kind)
        load_tokenizer(TINY_NAME).save(root / kind)
    adapted = add_lora(load_model(root / "model"), LoRAConfig(r=4), seed=1)
    save_lora(stir(adapted, "lora_B", 1 / 8), root / "lora")
    prefixed = add_prefix(load_model(root / "model"), PrefixConfig(num_virtual_tokens=4), seed=1)
    save_prefix(prefixed, root / "prefix")
    words = ("--model_path", root / "model", "--output_path", root / "program/llama")
    run_script(root, "export_generation_model.py", *words, "--check", "false")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def run_script(root, script, *words):
    """Run a script in this process; bad input is raised, not printed."""
    before = sys.argv
    sys.argv = [script, *(str(word).format(root=root) for word in words)]
    try:
        runpy.run_path(str(REPO / script))["main"]()
    finally:
        sys.argv = before


def opened(root, words, **changes):
    place = load((OpenArguments,), [word.format(root=root) for word in words], prog="x")[0]
    place = dataclasses.replace(place, **changes)
    return open_model(place, find_model(place))


def answer(root, words, tmp_path):
    """``predict_generation.py`` and ``infer_generation.py``, which are one function."""
    output = tmp_path / "answers.jsonl"
    run_script(
        root, "infer_generation.py", *words, "--prompt", "The token", "a", "--ignore_eos",
        *("--max_length", "6", "--output_file", output),
    )  # fmt: skip
    rows = output.read_text("utf-8").splitlines()
    assert len(rows) == 2
    model = opened(root, words)
    prompts = [model.tokenizer.encode(text, add_bos=True) for text in ("The token", "a")]
    found = model.open_engine(2, 64).generate(requests(prompts, GREEDY))
    for row, completion in zip(rows, found, strict=True):
        assert str(completion.ids) in row


def serve(root, words, tmp_path):
    place = load((OpenArguments,), [word.format(root=root) for word in words], prog="x")[0]
    served = open_served(place, find_model(place), ServerArguments(src_length=100, max_length=8))
    ids = served.model.tokenizer.encode("The token", add_bos=True)
    (direct,) = opened(root, words).open_engine(1, 64).generate([Request(ids, GREEDY)])
    assert [token.token_id for token in served.engine.stream(Request(ids, GREEDY))] == direct.ids


def evaluate(root, words, tmp_path):
    """Scores agree with log-probabilities of generation, which is another way through the model."""
    task = ("--task", "perplexity", "--data_file", "{root}/text.txt")
    given = [word.format(root=root) for word in (*words, *task)]
    place, args = load(SCRIPTS["evaluate_generation.py"], given, prog="x")
    found = find_model(place)
    (measured,) = read_tasks(args, found)
    model = open_model(place, found)
    scorer = open_scorer(model)
    assert measured.run(model, scorer)["token_perplexity"] > 1
    ids = model.tokenizer.encode("The token", add_bos=True)
    (free,) = model.open_engine(1, 64).generate([Request(ids, GREEDY)])
    (score,) = scorer.loglikelihood([(ids, free.ids)])
    # Inputs that are rounded to 8 bits may fall on the other side of a step.
    rough = 0.02 if words[1].endswith("A8W8") or "bf16" in words else 1e-4
    assert score.logprob == pytest.approx(sum(free.logprobs), rel=rough)
    assert score.is_greedy


def export(root, words, tmp_path):
    """The program answers as what it was made of; its own check takes another process."""
    output = ("--output_path", tmp_path / "new" / "llama", "--check", "false")
    run_script(root, "export_generation_model.py", *words, *output)
    request = [Request([1, 5, 9, 2], GREEDY)]
    program = opened(tmp_path, ("--model_dir", "{root}/new"))
    found = [
        one.open_engine(1, 16).generate(request)[0].ids for one in (program, opened(root, words))
    ]
    assert found[0] == found[1]


def merge(root, words, tmp_path):
    run_script(root, "merge_lora.py", *words, "--output_dir", tmp_path / "merged")
    assert opened(tmp_path, ("--model_name_or_path", "{root}/merged")).context == 512


def quantize(root, words, tmp_path):
    words = (*words, "--output_dir", tmp_path / "small", "--quant_type", "W8")
    run_script(root, "quantize_generation.py", *words)
    assert opened(tmp_path, ("--model_name_or_path", "{root}/small")).context == 512


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", OPENED)
def test_each_cell_works_or_says_why_not(root, kind, use, tmp_path):
    if kind in NEEDS_NATIVE and not native.available() and (kind, use) not in REFUSED:
        with pytest.raises(UserError, match="native ops"):
            globals()[use](root, OPENED[kind], tmp_path)
        return
    if (kind, use) not in REFUSED:
        globals()[use](root, OPENED[kind], tmp_path)
        return
    with pytest.raises(UserError, match=REFUSED[kind, use]):
        globals()[use](root, OPENED[kind], tmp_path)


def test_the_page_has_the_same_table():
    page = (REPO / "docs" / "model.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## What can be opened\n(.*?)^## ", page, re.M | re.S)
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert tuple(head[1:]) == USES
    assert [row[0].partition(":")[0] for row in rows] == list(OPENED)
    for kind, row in zip(OPENED, rows, strict=True):
        for use, cell in zip(USES, row[1:], strict=True):
            assert cell.startswith("yes") != ((kind, use) in REFUSED), (kind, use, cell)


def test_what_a_program_has_built_in_cannot_be_asked_for(root):
    given = [("--ops", "reference"), ("--head_type", "model"), ("--round_activations", "false")]
    for flag, value in (*given, ("--dtype", "float32"), ("--dtype", "bfloat16")):
        with pytest.raises(UserError, match=rf"{flag[2:]}=.* cannot be put on an exported program"):
            opened(root, ("--model_dir", "{root}/program", flag, value))


def test_a_model_is_needed_and_one_is_enough(root):
    with pytest.raises(UserError, match="a model is needed: --model_name_or_path DIR, or"):
        opened(root, ())
    with pytest.raises(UserError, match="are both given; open one model at a time"):
        opened(root, ("--model_name_or_path", "a", "--model_dir", "b"))


def test_an_export_is_served_in_one_process(root, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match="2 processes were launched, but an exported program runs"):
        run_script(root, "server.py", *OPENED["export"])


def test_lora_over_integers_in_one_process(root, monkeypatch):
    network = build.load_model(root / "W4", to_pack=True)
    network.seams.shard = object()  # as processes that share it have one
    monkeypatch.setattr(build, "load_model", lambda *_, **__: network)
    with pytest.raises(UserError, match=r"over integer weights works in one process, .* merge it"):
        open_weights(root / "W4", adapter=str(root / "lora"))


def test_cache_blocks_are_those_asked_for(root):
    model = opened(root, OPENED["model directory"], cache_blocks=7)
    assert model.open_engine(3, 64).num_free_blocks == 7
    engine = model.open_engine(1, 500)
    assert engine.max_model_len == 7 * 16
    with pytest.raises(UserError, match="the limit is 112, what 7 cache blocks hold; shorten"):
        engine.check(Request([1] * 110, GREEDY))


class Padded:
    """A runner whose vocabulary is larger than the tokenizer's."""

    vocab_size, max_model_len, block_size, eos_ids = 2000, 64, 16, ()


@pytest.mark.parametrize("kind", ["model directory", "LoRA adapter", "export"])
def test_an_opened_model_says_which_form_each_op_takes(root, kind, capsys):
    model = opened(root, OPENED[kind])
    forms = {choice.op: choice for choice in model.ops}
    unused = {
        "adamw",
        "cross_entropy",
        "frozen_matmul",
        *({"causal_attention", "low_rank"} if kind == "export" else ()),
    }
    assert set(forms) == set(OPS) - unused
    assert all(choice.why for choice in model.ops)
    decoder = forms["decoder"]
    if native.available():
        assert (decoder.form == "native") == (kind != "LoRA adapter"), "what runs, not what could"
    if kind == "LoRA adapter" and native.available():
        assert decoder.why == "op by op: layer 0 has a LoRALinear; merge the adapter first"


def test_an_adapter_trained_over_rounded_floats_merges_over_integers_of_files(
    root, tmp_path, caplog
):
    adapter = tmp_path / "lora"
    shutil.copytree(root / "lora", adapter)
    record = BaseRecord(QuantConfig.of_type("W8"), rounded_by="weight_only_int8").to_json()
    (adapter / "base_quantization.json").write_text(json.dumps(record), encoding="utf-8")
    words = ("--model_name_or_path", "{root}/W4", "--lora_path", adapter)
    run_script(root, "merge_lora.py", *words, "--output_dir", tmp_path / "merged")
    assert "trained over a base in W8, this one is W4 in groups of 8" in caplog.text
    assert not is_quantized(load_model(tmp_path / "merged"))


def test_other_processes_and_hints(root, monkeypatch):
    for script, words in (
        ("export_generation_model.py", OPENED["model directory"]),
        ("quantize_generation.py", (*OPENED["model directory"], "--output_dir", "x")),
        ("convert_checkpoint.py", ("--input_dir", "a", "--output_dir", "b")),
        ("merge_lora.py", (*OPENED["LoRA adapter"], "--output_dir", "x")),
    ):
        with monkeypatch.context() as launched:
            launched.setenv("PADDLE_TRAINERS_NUM", "2")
            with pytest.raises(UserError, match=f"2 processes were launched, but {script} runs"):
                run_script(root, script, *words)
    with pytest.raises(UserError, match="is an exported program, not a model: give it as --model_"):
        opened(root, ("--model_name_or_path", "{root}/program"))
    with pytest.raises(UserError, match=r"on CPU is for models without .*; use float32"):
        opened(root, (*OPENED["tuned prefix"], "--dtype", "bfloat16"))
    with pytest.raises(UserError, match="packed_cache='' names no place: give auto, off or a"):
        opened(root, (*OPENED["model directory"], "--packed_cache", ""))
    with pytest.raises(UserError, match="chat_template is for conversations; add --chat true"):
        words = (*OPENED["model directory"], "--chat_template", "simple", "--prompt", "a")
        run_script(root, "predict_generation.py", *words)
    with pytest.raises(UserError, match="needs --model_name_or_path: the directory of the ranks"):
        run_script(root, "predict_generation.py", "--merge_tensor_parallel_path", "x")
    with pytest.raises(
        UserError, match="cache_blocks, max_length would have no effect: --merge_tensor"
    ):
        words = (*OPENED["model directory"], "--max_length", "9", "--cache_blocks", "9")
        run_script(root, "predict_generation.py", *words, "--merge_tensor_parallel_path", "x")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_is_opened_takes_the_device_s_best_forms(monkeypatch, device):
    """Attention over whole rows and the loss too, which training's flags may turn off."""
    monkeypatch.setattr(build, "select_ops", partial(select_ops, device=device))
    choices = open_weights(TINY_NAME).ops.choices
    assert choices == select_ops(device=device).choices
    assert not [choice.op for choice in choices if choice.why.startswith("reference")]


def test_ids_beyond_the_tokenizer_are_no_text(root):
    model = dataclasses.replace(opened(root, OPENED["model directory"]), runner=Padded())
    assert model.vocab_size == model.tokenizer.vocab_size < 2000
    known = model.tokenizer.encode("store")
    assert model.text([1999, *known, 1500]) == model.text(known) == "store"


def test_an_answer_continues_its_prompt(root, shared_data):
    """Sentencepiece drops the space of a first word, unless something stands before it."""
    tokenizer = load_tokenizer(shared_data / "llama2.tokenizer.model")
    model = dataclasses.replace(opened(root, OPENED["model directory"]), tokenizer=tokenizer)
    whole = tokenizer.encode("one two three", add_bos=True)
    before = tokenizer.encode("one", add_bos=True)
    assert whole[: len(before)] == before
    assert model.text(whole[len(before) :], before) == " two three"
    assert model.text(whole[len(before) :]) == "two three"


def test_a_network_in_memory_answers_as_its_directory(root):
    network = load_model(root / "model")
    model = open_network(network, load_tokenizer(root / "model"))
    prompts = [model.tokenizer.encode(text, add_bos=True) for text in ("The token", "a")]
    found = [
        generate_texts(
            one.open_engine(2, 64), requests(prompts, GREEDY), [one.decoder() for _ in prompts]
        )
        for one in (model, opened(root, OPENED["model directory"]))
    ]
    assert found[0] == found[1] and all(found[0])


def test_end_tokens_of_the_tokenizer_and_of_the_config_both_end_an_answer(root):
    model = opened(root, OPENED["model directory"])
    assert model.differing_ends() == ""
    prompt = model.tokenizer.encode("The token")

    def answer(**changes):
        params = SamplingParams(max_new_tokens=6, temperature=1, seed=3, **changes)
        return model.open_engine(1, 64).generate([Request(prompt, params)])[0]

    ids = answer(ignore_eos=True).ids
    later = next(place for place in range(1, 6) if ids[place] not in ids[:place])
    model.tokenizer.special = dataclasses.replace(model.tokenizer.special, eos_ids=(ids[later],))
    assert (answer().ids, answer().finish_reason) == (ids[: later + 1], "stop")
    assert model.differing_ends().startswith(f"end tokens: {ids[later]} by the tokenizer, 2 by")
    model.runner.eos_ids = (ids[0],)
    assert answer().ids == ids[:1]
    assert answer(ignore_eos=True).ids == ids


def test_a_conversation_whose_lines_end_as_on_windows(root, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("store\r\n/reset\r\n/exit\r\nstore\r\n"))
    run_script(root, "predict_generation.py", *OPENED["model directory"], "--max_length", "2")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_prompts_are_read_before_a_model_is_opened(root, monkeypatch):
    monkeypatch.setattr("llm.serving.terminal.open_model", pytest.fail)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="nowhere"):
        words = (*OPENED["model directory"], "--data_file", "nowhere.jsonl")
        run_script(root, "predict_generation.py", *words)


def test_prompts_that_name_adapters(root, tmp_path):
    """Each is answered as with its adapter for all prompts."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": TEXT}, {"prompt": TEXT, "adapter": "p"}, {"prompt": TEXT, "adapter": "l"}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    flags = [f"l={root}/lora", f"p={root}/prefix"]
    words = ["--data_file", prompts, "--output_file", tmp_path / "answers.jsonl", "--max_length", 6]

    def answered(*more):
        run_script(root, "predict_generation.py", *OPENED["model directory"], *more, *words)
        rows = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["ids"] for row in rows]

    plain, prefixed, adapted = answered("--adapters", *flags)
    assert answered("--adapters", *flags, "--adapter", "l") == [adapted, prefixed, adapted]
    lines = [{"prompt": TEXT}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert answered() == [plain]
    assert answered("--lora_path", root / "lora") == [adapted] != [plain]
    assert answered("--prefix_path", root / "prefix") == [prefixed] != [plain]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adapters", "de"], "'de' has to be NAME=DIR"),
        (["--adapters", "a=x", "a=y"], "'a' is given twice, as x and as y"),
        (["--adapters", "a={root}/model"], "adapters: a: .* is a model, not an adapter"),
        (
            ["--adapters", "a={root}/lora", "--adapter", "b"],
            r"'b', which .* names a\); add --adapters b=DIR",
        ),
        (["--adapters", "a b={root}/lora"], "adapter name 'a b' has to be"),
        (
            ["--adapters", "a={root}/lora", "--adapter", "a", "--num_beams", "2"],
            "beam search answers without adapters",
        ),
    ],
)
def test_adapters_that_are_none(root, words, said):
    words = [word.format(root=root) for word in words]
    with pytest.raises(UserError, match=said):
        run_script(
            root, "predict_generation.py", *OPENED["model directory"], *words, "--prompt", "x"
        )


def test_an_exported_program_takes_no_adapters(root):
    with pytest.raises(UserError, match="cannot be put on an exported program; merge one when"):
        opened(root, (*OPENED["export"], "--adapters", "a=x"))
    model = opened(root, OPENED["export"])
    with pytest.raises(UserError, match="takes no adapters for single requests; open the model"):
        _ = model.adapters
    engine = model.open_engine(1, 64)
    with pytest.raises(UserError, match="adapter 'a': an exported program takes none"):
        engine.add(Request([1], GREEDY, adapter="a"))
