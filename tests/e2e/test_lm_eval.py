"""lm-evaluation-harness on this suite's models, in the environment that ``make lmeval`` makes.

``LM_EVAL_PYTHON`` names that environment's interpreter; without it the tests skip. Its ``lm_eval``
must have this project installed. ``LM_EVAL_HF_PYTHON`` names one with lm_eval, torch and
transformers, for the comparison with the harness's own backend.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data.corpus.readers import WikiText
from data.tokenizer import load_tokenizer
from external_ops import native
from llm.config.generation import OpenArguments
from llm.engine.engine import Engine
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.evaluation import choices, wikitext
from llm.evaluation.encoding import encode_pair
from llm.evaluation.scorer import NetworkScorer, open_scorer
from llm.llama.adapters.lora import LoRAConfig, add_lora, save_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, save_prefix
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import TINY_NAME, load_config
from llm.llama.export import export_program

TASKS = ("local_ceval", "local_texts", "local_answers")
DESCRIPTION = "以下是中国关于常识的单项选择题，请选出其中的正确答案。\n\n"
SHOTS = 2


def interpreter(variable):
    chosen = os.environ.get(variable)
    if chosen is None:
        pytest.skip(f"{variable} is not set; `make lmeval` makes an environment for it")
    if not Path(chosen).is_file():
        pytest.fail(f"{variable}={chosen} is not a file")
    return Path(chosen).absolute()


def environment():
    # Settings that this process made for paddle are not the other's.
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return kept | offline | {"CUDA_VISIBLE_DEVICES": ""}


def harness_tasks(python):
    """Return the directory of the harness's own task files."""
    find = "import importlib.util as u; print(u.find_spec('lm_eval').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip()) / "tasks"


def trained_model(repo):
    """Return the trained model that the suite fetches, in one form or the other."""
    forms = ("outputs/real-model", "outputs/chat/SmolLM2-135M-Instruct.Q4_1.gguf")
    found = [repo / form for form in forms if (repo / form).exists()]
    if not found:
        pytest.skip("`make real-model` or `make chat` fetches the trained model")
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose logits differ clearly, and an export of it."""
    root = tmp_path_factory.mktemp("harness")
    config = load_config(TINY_NAME).replace(max_position_embeddings=512)
    model = build_model(config, seed=5)
    model.eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 6)
    save_model(model, root / "model")
    rng = np.random.default_rng(4)
    adapted = add_lora(load_model(root / "model"), LoRAConfig(r=4), seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.set_value(rng.standard_normal(parameter.shape, dtype=np.float32) / 8)
    save_lora(adapted, root / "lora")
    prefixed = add_prefix(load_model(root / "model"), PrefixConfig(num_virtual_tokens=4), seed=1)
    save_prefix(prefixed, root / "prefix")
    export_program(model, root / "program" / "llama", model_name="tiny", block_size=16)
    for part in ("model", "program"):
        load_tokenizer(TINY_NAME).save(root / part)
    return root


@pytest.fixture(scope="module")
def harness(repo, tmp_path_factory):
    """Run the command line; return figures by task and all samples in order."""

    def run(python, model, arguments):
        output = tmp_path_factory.mktemp("results")
        command = [python.parent / "lm_eval", "--model", model, "--model_args", arguments]
        command += ["--tasks", ",".join(TASKS), "--include_path", "tests/fixtures/lm_eval"]
        command += ["--num_fewshot", str(SHOTS), "--batch_size", "4", "--device", "cpu"]
        command += ["--log_samples", "--output_path", output]
        done = subprocess.run(
            command, cwd=repo, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (figures,) = output.glob("**/results_*.json")
        samples = {}
        for task in TASKS:
            (file,) = output.glob(f"**/samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            samples[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        return json.loads(figures.read_text("utf-8"))["results"], samples

    return run


@pytest.fixture(scope="module")
def checkpoint_results(harness, place):
    python = interpreter("LM_EVAL_PYTHON")
    return harness(python, "paddle-llama", f"pretrained={place / 'model'},add_bos_token=False")


def logprobs(samples):
    return np.asarray([[float(choice[0][0]) for choice in item] for item in samples])


def assert_same(results, others):
    (figures, samples), (other_figures, other_samples) = results, others
    for metric in ("acc,none", "acc_norm,none"):
        assert figures["local_ceval"][metric] == other_figures["local_ceval"][metric]
    np.testing.assert_allclose(
        logprobs(samples["local_ceval"]), logprobs(other_samples["local_ceval"]), atol=1e-4
    )
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        one, other = (f["local_texts"][metric] for f in (figures, other_figures))
        assert one == pytest.approx(other, rel=1e-4)
    assert samples["local_answers"] == other_samples["local_answers"]


def test_the_harness_agrees_with_our_own_accuracy(checkpoint_results, place, repo):
    figures, samples = checkpoint_results
    fixtures = repo / "tests" / "fixtures" / "lm_eval"
    shots = choices.read_items(fixtures / "dev.csv")[:SHOTS]
    items = choices.with_shots(choices.read_items(fixtures / "test.csv"), shots, DESCRIPTION)
    tokenizer = load_tokenizer(place / "model")
    scorer = NetworkScorer(load_model(place / "model"))
    ours = choices.score(scorer, tokenizer, items, add_bos=False)
    for metric in ("acc", "acc_norm", "acc_stderr"):
        assert figures["local_ceval"][f"{metric},none"] == pytest.approx(ours[metric])
    direct = [
        [
            scorer.loglikelihood([encode_pair(tokenizer, item.prompt, f" {one}", add_bos=False)])
            for one in item.choices
        ]
        for item in items
    ]
    wanted = [[score.logprob for (score,) in item] for item in direct]
    np.testing.assert_allclose(logprobs(samples["local_ceval"]), wanted, atol=1e-4)


def test_a_program_gives_what_its_checkpoint_gives(checkpoint_results, harness, place):
    python = interpreter("LM_EVAL_PYTHON")
    arguments = f"program={place / 'program' / 'llama'},add_bos_token=False"
    assert_same(checkpoint_results, harness(python, "paddle-llama", arguments))


def test_the_harness_own_backend_gives_the_same(checkpoint_results, harness, place):
    python = interpreter("LM_EVAL_HF_PYTHON")
    # The tokenizer of these weights adds no BOS in transformers, hence add_bos_token=False above.
    arguments = f"pretrained={place / 'model'},dtype=float32"
    assert_same(checkpoint_results, harness(python, "hf", arguments))


BAD = [
    ({}, "a model is needed: --model_name_or_path DIR, or --model_dir DIR"),
    ({"pretrained": "a", "program": "b/c"}, "--model_name_or_path and --model_dir are both given"),
    ({"pretrained": "a", "device": "GPU"}, "device='GPU' is not a device; write a kind"),
    ({"pretrained": "a", "batch_size": "many"}, "batch_size='many' has to be a whole number"),
    ({"program": "none/llama"}, "model_dir none does not exist"),
]


def opened(place):
    """What else than a plain directory can be opened, as the harness's arguments."""
    return {
        "lora": {"lora_path": str(place / "lora")},
        "prefix": {"prefix_path": str(place / "prefix")},
        "bfloat16": {"dtype": "bf16"},
    }


@pytest.fixture(scope="module")
def driven(place, repo, tmp_path_factory, shared_data):
    """What the backend class answers when it is driven directly."""
    python = interpreter("LM_EVAL_PYTHON")
    pages = WikiText().read((shared_data / "wikitext2.valid.txt").read_bytes()).texts
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Go on "},
    ]
    model = {"pretrained": str(place / "model"), "batch_size": 3}
    request = {
        "bad": [args for args, _ in BAD],
        "models": {
            "whole": model,
            "short": model | {"max_length": 16},
            **{name: model | changes for name, changes in opened(place).items()},
        },
        "pairs": [["The sky is", " blue"], ["", "Blue"], ["word " * 40, " end"], ["a ", "b"]],
        "texts": ["one two three", "word " * 40, ""],
        "questions": [
            ["The sky", {"until": ["e"], "max_gen_toks": 9}],
            ["The sky", {"max_gen_toks": 9}],
            ["The sky", {"max_gen_toks": 9, "do_sample": True, "temperature": 2.0, "seed": 3}],
        ],
        "chat": chat,
        "pages": pages,
    }
    directory = tmp_path_factory.mktemp("driven")
    (directory / "request.json").write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        [python, repo / "tests" / "e2e" / "lm_eval_side.py", directory],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request, json.loads((directory / "answers.json").read_text("utf-8")), done.stderr


def test_bad_arguments_are_refused(driven):
    for got, (_, message) in zip(driven[1]["refusals"], BAD, strict=True):
        assert message in got
    assert "generation setting 'num_beams' is not supported" in driven[1]["whole"]["setting"]
    assert "max_gen_toks=4096 leaves no room for a prompt" in driven[1]["whole"]["room"]


def test_requests_directly(driven, place):
    request, answers, said = driven
    tokenizer = load_tokenizer(place / "model")
    for name, length in (("whole", None), ("short", 16)):
        scorer = NetworkScorer(load_model(place / "model"), max_length=length)
        got = answers[name]
        pairs = [encode_pair(tokenizer, *pair) for pair in request["pairs"]]
        wanted = [[score.logprob, score.is_greedy] for score in scorer.loglikelihood(pairs)]
        np.testing.assert_allclose(got["pairs"], wanted, rtol=1e-5)
        documents = [tokenizer.encode(text) for text in request["texts"]]
        np.testing.assert_allclose(
            got["rolling"], scorer.rolling(documents, tokenizer.bos_id), rtol=1e-5
        )
    assert "1 of 4 contexts exceed 16 tokens and lost their beginning" in said


@pytest.mark.parametrize("name", ["lora", "prefix", "bfloat16"])
def test_whatever_can_be_opened_is_measured(driven, place, name):
    if name == "bfloat16" and not native.available():
        pytest.skip(native.reason())
    request, answers, _ = driven
    which = OpenArguments(model_name_or_path=str(place / "model"))
    for key, value in opened(place)[name].items():
        setattr(which, key, {"bf16": "bfloat16"}.get(value, value))
    which.validate()
    model = open_model(which, find_model(which))
    pairs = [encode_pair(model.tokenizer, *pair) for pair in request["pairs"]]
    wanted = [score.logprob for score in open_scorer(model).loglikelihood(pairs)]
    got = [logprob for logprob, _ in answers[name]["pairs"]]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    plain = [logprob for logprob, _ in answers["whole"]["pairs"]]
    assert np.abs(np.subtract(got, plain)).max() > 1e-4, "the plain model was measured"


def test_answers_directly(driven, place):
    answers = driven[1]
    tokenizer = load_tokenizer(place / "model")
    engine = Engine(DygraphRunner(load_model(place / "model")), max_sequences=1, max_tokens=64)
    prompt = tokenizer.encode("The sky", add_bos=True)
    params = SamplingParams(max_new_tokens=9, temperature=0)
    free = tokenizer.decode(engine.generate([Request(prompt, params)])[0].ids)
    stopped, greedy, sampled = answers["whole"]["generated"]
    assert (stopped, greedy) == (free.partition("e")[0], free)
    assert sampled != greedy


def test_chat_templates(driven, place):
    request, answers, _ = driven
    tokenizer = load_tokenizer(place / "model")
    got = answers["whole"]
    assert got["chat"] == tokenizer.render_chat(request["chat"])
    assert got["chat_ids"] == tokenizer.apply_chat_template(request["chat"])
    assert got["chat"].startswith(got["open_chat"])
    assert got["open_chat"].endswith("Go on")
    assert got["template"] == tokenizer.chat_template
    assert tokenizer.fingerprint[:16] in got["tokenizer_name"]


def test_wikitext_rules_are_the_harness_own(driven):
    request, answers, _ = driven
    assert len(request["pages"]) > 10
    assert [wikitext.detokenize(page) for page in request["pages"]] == answers["pages"]
    assert [wikitext.count_words(page) for page in request["pages"]] == answers["words"]
