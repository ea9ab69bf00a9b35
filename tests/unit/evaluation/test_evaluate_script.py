"""evaluate_generation.py: figures, the report, and what it refuses before any work."""

import json
import math
import runpy
import subprocess
import sys

import numpy as np
import pytest

from common.errors import UserError
from common.flags import load
from data.conversations.instruct import read_examples
from data.corpus.token_store_writer import TokenStoreWriter
from data.tokenizer import load_tokenizer
from llm.config.scripts import SCRIPTS
from llm.engine.engine import Engine
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.engine.texts import generate_texts
from llm.evaluation import report, wikitext
from llm.evaluation.perplexity import Document, perplexity
from llm.evaluation.scorer import NetworkScorer, open_scorer
from llm.evaluation.tasks import read_tasks
from llm.llama.adapters.lora import LoRAConfig, add_lora, save_lora
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.llama.export import export_program

TEXT = " = Lobster = \n\n A lobster , which is a @-@ typed animal , lives in the sea . \n"
RUNNING = " = Lobster =\n\nA lobster, which is a-typed animal, lives in the sea.\n"
CSV = "question,A,B,C,D,answer\nUp?,x,y,z,w,A\nDown?,x,y,z,w,B\nLeft?,x,y,z,w,D\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an adapter and an export of it, and data of every kind."""
    root = tmp_path_factory.mktemp("measured")
    tokenizer = load_tokenizer(TINY_NAME)
    model = build_model(load_config(TINY_NAME).replace(max_position_embeddings=256), seed=4)
    model.eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 8)
    save_model(model, root / "model")
    export_program(
        model,
        root / "program" / "llama",
        model_name="tiny",
        block_size=8,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    for part in ("model", "program"):
        tokenizer.save(root / part)
    add_lora(model, LoRAConfig(r=2, lora_alpha=64, target_modules=("q_proj", "o_proj")), seed=1)
    rng = np.random.default_rng(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(rng.standard_normal(parameter.shape, dtype=np.float32) / 8)
    save_lora(model, root / "adapter")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    (root / "plain.txt").write_text(TEXT[1:], encoding="utf-8")
    lines = [{"text": "one two three"}, {"text": " four"}]
    (root / "text.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (root / "val.csv").write_text(CSV, encoding="utf-8")
    (root / "dev.csv").write_text(CSV, encoding="utf-8")
    pairs = [{"src": "Say no", "tgt": "no"}, {"src": "Say " + "long " * 300, "tgt": "yes"}]
    (root / "ask.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    with TokenStoreWriter(root / "store", np.uint16) as writer:
        writer.add_document(tokenizer.encode(TEXT))
        writer.add_document(tokenizer.encode("more", add_eos=True))
    return root


def arguments(place, *words):
    given = [word.format(root=place) for word in words]
    return load(SCRIPTS["evaluate_generation.py"], given, prog="x")


def measure(place, *words):
    """Do what the script does, in this process."""
    which, args = arguments(place, *words)
    found = find_model(which)
    tasks = read_tasks(args, found)
    model = open_model(which, found)
    scorer = open_scorer(model, batch_size=args.batch_size)
    return [(task.run(model, scorer), task.settings) for task in tasks]


MODEL = ("--model_name_or_path", "{root}/model")
PROGRAM = ("--model_dir", "{root}/program")


def test_text_is_scored_behind_a_bos_and_counted_as_it_was(place):
    tokenizer = load_tokenizer(TINY_NAME)
    scorer = NetworkScorer(load_model(place / "model"))
    ((got, settings),) = measure(
        place, *MODEL, "--task", "perplexity", "--data_file", "{root}/text.txt",
        *("--wikitext_detokenize", "--max_length", "16", "--stride", "5"),
    )  # fmt: skip
    ids = np.asarray(tokenizer.encode(RUNNING, add_bos=True))
    direct = perplexity(scorer, [Document(ids)], max_length=16, stride=5)
    assert got["token_perplexity"] == pytest.approx(direct.token_perplexity)
    assert got["tokens"] == len(ids) - 1
    assert (got["words"], got["bytes"]) == (len(TEXT.split()) + 2, len(TEXT))
    wanted = math.exp(-direct.logprob / got["words"])
    assert got["word_perplexity"] == pytest.approx(wanted)
    assert settings["format"] == "wikitext"
    assert (settings["max_length"], settings["stride"]) == (16, 5)


def test_documents_of_jsonl_are_scored_alone(place):
    tokenizer = load_tokenizer(TINY_NAME)
    scorer = NetworkScorer(load_model(place / "model"))
    ((got, _),) = measure(place, *MODEL, "--task", "perplexity", "--data_file", "{root}/text.jsonl")
    texts = ["one two three", " four"]
    ids = [np.asarray(tokenizer.encode(text, add_bos=True)) for text in texts]
    totals = [perplexity(scorer, [Document(one)]).logprob for one in ids]
    count = sum(map(len, ids)) - 2
    assert got["token_perplexity"] == pytest.approx(math.exp(-sum(totals) / count))
    assert got["words"] == 3 + 2  # the blank before "four" leaves an empty word, as in the harness
    ((first, _),) = measure(
        place, *MODEL, "--task", "perplexity", "--data_file", "{root}/text.jsonl", "--limit", "1"
    )  # fmt: skip
    assert first["token_perplexity"] == pytest.approx(math.exp(-totals[0] / (len(ids[0]) - 1)))


def test_a_token_store_is_one_stream(place):
    tokenizer = load_tokenizer(TINY_NAME)
    ids = [*tokenizer.encode(TEXT), *tokenizer.encode("more", add_eos=True)]
    ((got, _),) = measure(place, *MODEL, "--task", "perplexity", "--data_file", "{root}/store")
    scorer = NetworkScorer(load_model(place / "model"))
    wanted = perplexity(scorer, [Document(np.asarray(ids))]).token_perplexity
    assert got == {"token_perplexity": pytest.approx(wanted), "tokens": len(ids) - 1}


TASKS = (
    *("--task", "perplexity", "choices", "squad", "--data_file", "{root}/text.txt"),
    *("{root}/val.csv", "{root}/ask.jsonl", "--stride", "7", "--max_length", "20"),
    *("--few_shot_file", "{root}/dev.csv", "--num_few_shot", "2", "--max_answer_tokens", "6"),
)


def test_a_program_measures_as_its_network(place):
    network = [figures for figures, _ in measure(place, *MODEL, *TASKS)]
    program = [figures for figures, _ in measure(place, *PROGRAM, *TASKS)]
    for one, other in zip(network, program, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_an_adapter_changes_the_figures(place):
    words = ("--task", "perplexity", "--data_file", "{root}/text.txt")
    ((plain, _),) = measure(place, *MODEL, *words)
    ((adapted, _),) = measure(place, *MODEL, "--lora_path", "{root}/adapter", *words)
    assert abs(math.log(adapted["token_perplexity"] / plain["token_perplexity"])) > 0.01


def test_questions_are_asked_as_training_asks_and_cut_at_stops(place):
    tokenizer = load_tokenizer(TINY_NAME)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say no"}])
    model = load_model(place / "model")
    engine = Engine(DygraphRunner(model), max_sequences=1, max_tokens=len(prompt) + 6)
    params = SamplingParams(max_new_tokens=6, temperature=0)
    answer = tokenizer.decode(engine.generate([Request(prompt, params)])[0].ids).strip()
    assert len(answer) > 3
    content = {"src": "Say no", "tgt": answer}
    (place / "right.jsonl").write_text(json.dumps(content), encoding="utf-8")
    words = ("--task", "squad", "--max_answer_tokens", "6")
    ((right, settings),) = measure(place, *MODEL, *words, "--data_file", "{root}/right.jsonl")
    assert (right["exact_match"], right["f1"], right["total"]) == (100, 100, 1)
    assert settings["chat_template"] == tokenizer.chat_template
    assert "Say no" in settings["first_prompt"]
    # The second question of the file does not fit and counts as wrong.
    ((both, _),) = measure(place, *MODEL, *words, "--data_file", "{root}/ask.jsonl")
    assert (both["total"], both["missing"], both["too_long"]) == (2, 1, 1)
    free = engine.num_free_blocks
    request = Request(prompt, params)
    whole = tokenizer.decode(engine.generate([request])[0].ids)
    assert generate_texts(engine, [request], [tokenizer.stream()], [[answer[2]]]) == [
        whole.partition(answer[2])[0]
    ]
    assert engine.num_free_blocks == free and not engine.has_work


def test_few_shots_and_description_are_in_the_prompt(place):
    ((_, settings),) = measure(
        place, *MODEL, "--task", "choices", "--data_file", "{root}/val.csv",
        *("--few_shot_file", "{root}/dev.csv", "--num_few_shot", "1", "--description", "Choose.\n"),
    )  # fmt: skip
    question = "Up?\nA. x\nB. y\nC. z\nD. w\nAnswer:"
    assert settings["first_prompt"] == f"Choose.\n{question} A\n\n{question}"


def test_the_script_reports_figures_and_settings(place, repo, tmp_path):
    words = [word.format(root=place) for word in (*MODEL, *TASKS)]
    output = tmp_path / "deep" / "figures.json"
    done = subprocess.run(
        [sys.executable, "evaluate_generation.py", *words, "--output_file", output],
        cwd=repo,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [result["task"] for result in content["results"]] == ["perplexity", "choices", "squad"]
    assert content["model"]["model_name_or_path"] == f"{place}/model"
    assert content["results"][0]["settings"]["stride"] == 7
    assert content["versions"]["paddlepaddle"]
    expected = [figures for figures, _ in measure(place, *MODEL, *TASKS)]
    for result, figures in zip(content["results"], expected, strict=True):
        assert result["figures"] == pytest.approx(figures, rel=1e-6)
        for name in figures:
            assert f"{name} " in done.stdout
    assert "acc_norm" in done.stdout and "val.csv" in done.stdout


def test_given_answers_need_no_model(place, repo, shared_data, tmp_path):
    file = shared_data / "squad_v1.1_fixture.json"
    examples = read_examples([file])
    content = json.loads(file.read_text(encoding="utf-8"))
    ids = [q["id"] for a in content["data"] for p in a["paragraphs"] for q in p["qas"]]
    said = {key: example.answers[0] for key, example in zip(ids, examples, strict=True)}
    said[ids[0]] = "nothing of the kind"
    (tmp_path / "said.json").write_text(json.dumps(said), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "evaluate_generation.py", "--task", "squad", "--data_file", file),
            *("--predictions_file", tmp_path / "said.json"),
        ],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{100 * (len(ids) - 1) / len(ids):.4f}" in done.stdout


def test_wikitext_becomes_running_text():
    assert wikitext.detokenize(TEXT) == RUNNING
    marks = "1 @,@ 000 @.@ 5 ( a b ) [ c ] { d } \" e f \" ' g ' x 's = = h = = 9 ° C s ' N y \n z"
    assert wikitext.detokenize(marks) == (
        "1,000.5 (a b) [c] {d} \"e f\" 'g' x's == h == 9°C s' 1 y\nz"
    )
    assert wikitext.count_words(" one  two\nthree ") == 5


def run_main(repo, place, words):
    script = runpy.run_path(str(repo / "evaluate_generation.py"))
    old, sys.argv = sys.argv, ["x", *(word.format(root=place) for word in words)]
    try:
        script["main"]()
    finally:
        sys.argv = old


P = ("--task", "perplexity", "--data_file")
BAD = {
    "no task": ((*MODEL,), "--task and --data_file are needed"),
    "unknown task": (
        (*MODEL, "--task", "rouge", "--data_file", "x"),
        "task='rouge' is not one of perplexity, squad, cmrc, choices, ceval",
    ),
    "unknown flag": (
        (*MODEL, *P, "x", "--strides", "3"),
        "unknown 'strides'; did you mean 'stride'",
    ),
    "pairs": (
        (*MODEL, "--task", "squad", "choices", "--data_file", "a", "b", "c"),
        "2 tasks but 3 data files; give one task, or one task per file",
    ),
    "stride": (
        (*MODEL, *P, "x", "--stride", "9", "--max_length", "8"),
        "stride=9 exceeds max_length=8",
    ),
    "stride 0": ((*MODEL, *P, "x", "--stride", "0"), "stride=0 but the minimum is 1"),
    "window": (
        (*MODEL, *P, "x", "--max_length", "257"),
        "max_length=257 has to be between 1 and the model's context of 256",
    ),
    "window of a program": ((*PROGRAM, *P, "x", "--max_length", "257"), "context of 256"),
    "two models": ((*MODEL, *PROGRAM, *P, "x"), "--model_name_or_path and --model_dir are both"),
    "two adapters": (
        (*MODEL, "--lora_path", "a", "--prefix_path", "b", *P, "x"),
        "lora_path and prefix_path are both given",
    ),
    "adapter on a program": (
        (*PROGRAM, "--lora_path", "a", *P, "x"),
        "the adapter a cannot be put on an exported program; merge it when exporting",
    ),
    "no adapter": (
        (*MODEL, "--lora_path", "{root}/none", *P, "{root}/text.txt"),
        "none' is not a directory with an adapter",
    ),
    "another kind of adapter": (
        (*MODEL, "--prefix_path", "{root}/adapter", *P, "{root}/text.txt"),
        "adapter_config.json: .*LORA",
    ),
    "no model": ((*P, "{root}/text.txt"), "a model is needed: --model_name_or_path DIR, or"),
    "dtype": ((*MODEL, "--dtype", "float16", *P, "x"), "dtype=float16 needs a GPU"),
    "dtype of a program": (
        (*PROGRAM, "--dtype", "bfloat16", *P, "x"),
        "dtype=bfloat16 cannot be put on an exported program, which has its own; give it when",
    ),
    "adapter in bfloat16": (
        (*MODEL, "--lora_path", "a", "--dtype", "bfloat16", *P, "x"),
        "dtype=bfloat16 on CPU is for models without an adapter, not for a; merge it",
    ),
    "predictions": (
        (*MODEL, *P, "x", "--predictions_file", "y"),
        "predictions_file is given but task is not squad",
    ),
    "no data": ((*MODEL, *P, "{root}/none"), "none"),
    "ending": ((*MODEL, *P, "{root}/val.csv"), "unknown ending '.csv'"),
    "bad line": (
        (*MODEL, *P, "{root}/ask.jsonl"),
        r"ask.jsonl:1: no key 'text' \(its keys: 'src', 'tgt'\)",
    ),
    "detokenized store": (
        (*MODEL, *P, "{root}/store", "--wikitext_detokenize"),
        "wikitext_detokenize needs text, but .*store is a token store",
    ),
    "few shots": (
        (
            *(*MODEL, "--task", "choices", "--data_file", "{root}/val.csv"),
            *("--few_shot_file", "{root}/dev.csv"),
        ),
        "num_few_shot=5, but .*dev.csv has only 3 questions",
    ),
    "template": (
        (*MODEL, "--task", "squad", "--data_file", "{root}/ask.jsonl", "--chat_template", "nix"),
        "unknown chat template 'nix'",
    ),
    "output": (
        (*MODEL, *P, "{root}/text.txt", "--output_file", "{root}"),
        "output_file .* is a directory; give a file name",
    ),
    "output below a file": (
        (*MODEL, *P, "{root}/text.txt", "--output_file", "{root}/text.txt/x.json"),
        "text.txt is not a directory",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_model(place, repo, case, monkeypatch):
    words, message = BAD[case]
    monkeypatch.setattr("llm.engine.opening.open_model", pytest.fail)
    with pytest.raises(UserError, match=message):
        run_main(repo, place, words)


def test_prompts_without_room(place):
    words = ("--task", "squad", "--data_file", "{root}/ask.jsonl", "--max_answer_tokens", "255")
    with pytest.raises(
        UserError, match=r"the shortest prompt of .* has .* tokens, but the context"
    ):
        measure(place, *MODEL, *words)


def test_a_tokenizer_of_another_model(place, shared_data):
    words = ("--tokenizer_name_or_path", str(shared_data / "llama2.tokenizer.model"), *P, "x")
    with pytest.raises(UserError, match="has 32000 tokens, the model's vocab_size is 1024"):
        find_model(arguments(place, *MODEL, *words)[0])
    message = r"tiny was exported with another tokenizer \(fingerprint \w{12}\) than sentencepiece"
    with pytest.raises(UserError, match=message):
        find_model(arguments(place, *PROGRAM, *words)[0])


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    file.write_text("old", encoding="utf-8")
    monkeypatch.setattr(report, "environment", lambda: {"unwritable": object()})
    with pytest.raises(TypeError):
        report.write(str(file), {}, [])
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_large_figure_takes_no_line_of_its_own():
    figures = {"word_perplexity": 4.25e190, "token_perplexity": 19.66, "tokens": 12_000}
    lines = report.table([report.Result("perplexity", "f.txt", {}, figures)]).splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["4.2500e+190", "19.6600", "12,000"]
