"""Messages whose advice is taken, and works: each case is a mistake, what is said, and the cure."""

import json
import shutil
from types import SimpleNamespace

import pytest

from common.errors import UserError, near_name
from common.flags import load
from data.arguments import GROUPS as PREPARE
from data.prepare import PROG, prepare
from data.prepare import main as prepare_main
from data.tokenizer import load_tokenizer
from llm.config.evaluation import EvaluateArguments
from llm.config.finetune import FinetuneArguments
from llm.config.generation import SamplingArguments
from llm.config.network import NetworkArguments
from llm.config.scripts import SCRIPTS
from llm.config.tools import QuantizeArguments
from llm.engine.finding import find_weights
from llm.evaluation.tasks import PerplexityTask
from llm.llama.build import build_model
from llm.llama.config import load_config
from llm.llama.files import peft
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization import post_training
from llm.serving.terminal import Conversation
from llm.train import checkpoints, checks

TINY = "__internal_testing__/tiny-random-llama"


def said(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# A name that is unknown somewhere, and what is near it there.
NEAR = [
    ("finetune_generation.py", "max_step", "max_steps"),
    ("finetune_generation.py", "lora_ranks", "lora_rank"),
    ("finetune_generation.py", "learing_rate", "learning_rate"),
    ("run_pretrain.py", "min_lr_rate", "min_lr"),
    ("predict_generation.py", "temprature", "temperature"),
    # Another program's.
    ("run_pretrain.py", "unifed_checkpoint", "unified_checkpoint"),
    # Those whose near_name spelling means something else.
    ("convert_checkpoint.py", "tokenizer_name_or_path", None),
    ("run_pretrain.py", "data_dir", None),
]


@pytest.mark.parametrize(("script", "name", "near"), NEAR)
def test_a_spelling_is_suggested_only_where_it_is_near(script, name, near):
    message = said(load, SCRIPTS[script], [f"--{name}", "1"], prog=script)
    if near is None:
        assert "did you mean" not in message and "--help lists what there is" in message
    else:
        assert f"did you mean '{near}'?" in message


def test_a_model_name_is_no_tokenizers():
    known = {"tokenizer_name_or_path", "output_dir", "max_seq_length"}
    assert near_name("model_name_or_path", known) is None


def damaged(output_dir):
    path = output_dir / "checkpoint-3"
    path.mkdir(parents=True)
    (path / "complete.json").write_text(json.dumps({"step": 3, "files": {"x": 5}}))


def check_output(output_dir, *words):
    words = ["--do_train", "--output_dir", str(output_dir), *words]
    (run,) = load([FinetuneArguments], words, prog="x")
    resume, _ = checkpoints.find_resume(output_dir, run.resume_from_checkpoint)
    checks.check_output_dir(output_dir, NetworkArguments(), run, resume)


@pytest.mark.parametrize("flags", [(), ("--resume_from_checkpoint", "true")])
def test_only_a_damaged_checkpoint(flags, tmp_path):
    damaged(tmp_path / "out")
    message = said(check_output, tmp_path / "out", *flags)
    assert "x is missing" in message and "start over with --overwrite_output_dir true" in message
    assert "continue with" not in message and "drop the flag" not in message
    check_output(tmp_path / "out", "--overwrite_output_dir", "true")


def test_a_complete_checkpoint_is_offered(tmp_path):
    damaged(tmp_path / "out")
    (tmp_path / "out" / "checkpoint-3" / "x").write_text("12345")
    message = said(check_output, tmp_path / "out")
    assert "continue with --resume_from_checkpoint true" in message
    check_output(tmp_path / "out", "--resume_from_checkpoint", "true")


def test_nothing_there_to_resume(tmp_path):
    message = said(check_output, tmp_path / "out", "--resume_from_checkpoint", "true")
    assert "drop the flag to start from scratch" in message
    check_output(tmp_path / "out")


def test_an_adapter_given_as_a_model(tmp_path):
    file = tmp_path / "adapter_config.json"
    for kind, cures in (("LORA", ("--lora_path", "merge_lora.py")), ("PREFIX_TUNING", ())):
        file.write_text(json.dumps({"peft_type": kind}))
        message = said(load_config, tmp_path)
        assert all(cure in message for cure in cures)
        assert ("merge_lora.py" in message) == (kind == "LORA")
        assert "give the model that it was trained on" in message
        assert find_weights(TINY, adapter=str(tmp_path), kind=kind).config == load_config(TINY)


def test_a_prefix_given_to_merge(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    message = said(peft.read_config, tmp_path, "LORA")
    assert "--prefix_path where a script has that; it cannot be merged" in message
    assert "prefix_path" in said(
        load, SCRIPTS["merge_lora.py"], ["--prefix_path", str(tmp_path)], prog="x"
    )
    assert peft.read_config(tmp_path, "PREFIX_TUNING")


def test_perplexity_without_its_key(tmp_path):
    file, tokenizer = tmp_path / "a.jsonl", load_tokenizer(TINY)
    file.write_text('{"content": "some words"}\n')
    message = said(PerplexityTask, str(file), EvaluateArguments(), tokenizer)
    assert "no key 'text'" in message and "rename yours" in message and "--" not in message
    file.write_text(file.read_text().replace("content", "text"))
    assert PerplexityTask(str(file), EvaluateArguments(), tokenizer).documents
    other = file.rename(tmp_path / "a.data")
    message = said(PerplexityTask, str(other), EvaluateArguments(), tokenizer)
    assert ".jsonl" in message and "Give the file one of these endings" in message
    assert "--" not in message


def test_prepare_names_its_own_key_flag(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "some words"}\n')
    words = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", TINY]
    words += ["--output_prefix", str(tmp_path / "out")]
    assert "see --json_key" in said(prepare, words)
    prepare([*words, "--json_key", "content"])


def test_formats_of_examples_that_are_offered_are_taken(tmp_path, monkeypatch, capsys):
    record = {"instruction": "Say it.", "input": "", "output": "It."}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    words = ["--task", "instruct", "--tokenizer", TINY, "--chat_template", "plain"]
    words += ["--input", str(tmp_path / "a.json"), "--output_prefix", str(tmp_path / "out")]

    def run(form):
        monkeypatch.setattr("sys.argv", [PROG, *words, "--input_format", form, "--overwrite"])
        prepare_main()
        return capsys.readouterr().out

    offered = said(run, "txt").partition("choose auto, ")[2].split()
    assert "json" in [form.strip(",") for form in offered]
    for form in offered:
        load(PREPARE, [*words, "--input_format", form.strip(",")], prog=PROG)
    assert "1 examples" in run("json")


def test_a_prompt_too_long_says_which_limit(monkeypatch):
    model = SimpleNamespace(context=64, tokenizer=load_tokenizer(TINY))
    prompt = "word " * 6
    tokens = len(model.tokenizer.encode(prompt, add_bos=True))
    assert tokens < 60

    def encode(**limits):
        return Conversation(model, SamplingArguments(**limits), chat=False).encode(prompt)

    message = said(encode, max_length=62)
    assert f"lower --max_length to {64 - tokens}" in message and "raise" not in message
    assert encode(max_length=64 - tokens)
    message = said(encode, max_length=4, src_length=5)
    assert "raise --src_length" in message and "lower" not in message
    assert encode(max_length=4, src_length=tokens)


@pytest.mark.parametrize(("inputs", "cure"), [(64, 32), (60, None), (48, 24)])
def test_a_group_size_that_does_not_divide(inputs, cure):
    def groups(size):
        return QuantConfig(weight_bits=4, group_size=size, packed=True).groups(inputs, "x")

    message = said(groups, 40)
    if cure is None:
        assert "none does: use 8 bits" in message
        assert QuantConfig(weight_bits=8).groups(inputs, "x") == 1
    else:
        assert f"the largest that does is {cure}" in message
        assert groups(cure) == inputs // cure


@pytest.mark.parametrize(
    ("shape", "size"),
    # The tiny model's linears have 64 and 176 inputs.
    [({}, 16), ({"intermediate_size": 192}, 64), ({"intermediate_size": 200}, 8)],
)
def test_a_group_size_fits_all_linears(shape, size):
    network = build_model(load_config("tiny-random-llama").replace(**shape), seed=0)

    def quantize(**flags):
        args = QuantizeArguments(
            model_name_or_path="in", output_dir="out", quant_type="W4", method="rtn", **flags
        )
        return post_training.quantize(network, args, None)["group_size"]

    message = said(quantize, group_size=128)
    assert f"the largest that does is {size}" in message
    assert quantize() == size
    network = build_model(load_config("tiny-random-llama").replace(**shape), seed=0)
    assert quantize(group_size=size) == size


def test_a_model_that_no_group_fits():
    config = load_config("tiny-random-llama").replace(intermediate_size=60)
    network = build_model(config, seed=0)

    def quantize(kind):
        args = QuantizeArguments(
            model_name_or_path="in", output_dir="out", quant_type=kind, method="rtn"
        )
        return post_training.quantize(network, args, None)["quant_type"]

    assert "use 8 bits" in said(quantize, "W4")
    assert quantize("W8") == "W8"


def test_an_adapter_of_embeddings(tmp_path):
    tensors = {"base_model.model.model.embed_tokens.lora_embedding_A": None}
    message = said(peft.check_tensors, tmp_path, tensors, {}, None)
    assert "without embed_tokens in target_modules" in message and "another" not in message


def test_an_adapter_of_a_head_that_is_the_embedding(tmp_path):
    tensors = {"base_model.model.lm_head.lora_A.weight": None}
    message = said(peft.check_tensors, tmp_path, tensors, {}, None)
    assert "without lm_head in target_modules" in message and "another model" not in message


def test_resumed_once_the_damaged_one_is_gone(tmp_path):
    damaged(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    check_output(tmp_path / "out")
