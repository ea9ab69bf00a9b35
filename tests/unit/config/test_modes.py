"""Flags whose mode is off are refused with the mode's name; a file's defaults are not."""

import pytest
import yaml

from common.errors import UserError
from common.flags import arg, load, meant
from data.arguments import GROUPS as PREPARE
from llm.config.scripts import SCRIPTS
from llm.planner.__main__ import read_recipe

TRAIN = ["--do_train", "--max_steps", "1"]
TUNE = ["--dataset_path", "d", "--do_train"]
MEASURE = ["--dataset_path", "d", "--do_eval"]
EVALUATE = ["--model_name_or_path", "m", "--data_file", "f", "--task"]
W4 = ["--quant_type", "W4", "--method", "rtn"]
QUANTIZE = ["--model_name_or_path", "m", "--output_dir", "o"]
CORPUS = ["--input", "i", "--tokenizer", "t", "--output_prefix", "o"]
MODEL = ["--model_name_or_path", "m"]
BATCH = ["--input_file", "i", "--output_file", "o"]

# script, its other words, the flag without its mode, what the message names
IDLE = [
    ("run_pretrain.py", TRAIN, "--eval_steps 5", "do_eval"),
    ("run_pretrain.py", TRAIN, "--max_evaluate_steps 5", "do_eval"),
    ("run_pretrain.py", TRAIN, "--scale_loss 8", "fp16"),
    ("run_pretrain.py", ["--do_eval"], "--overlap_communication", "do_train"),
    ("run_pretrain.py", TRAIN, "--fp8 true", "bf16"),
    ("run_pretrain.py", TRAIN, "--recompute_granularity core_attn", "recompute"),
    ("run_pretrain.py", TRAIN, "--logging_dir x", "report_to"),
    ("run_pretrain.py", TRAIN, "--ignore_data_skip", "resume_from_checkpoint"),
    (
        "run_pretrain.py",
        [*TRAIN, "--lr_scheduler_type=constant"],
        "--decay_steps 5",
        "lr_scheduler_type",
    ),
    ("run_pretrain.py", ["--do_eval"], "--warmup_tokens 64", "do_train"),
    ("run_pretrain.py", ["--do_eval"], "--decay_tokens 64", "do_train"),
    ("run_pretrain.py", [*TRAIN, "--warmup_tokens=9"], "--warmup_ratio 0.1", "warmup_tokens"),
    ("run_pretrain.py", [*TRAIN, "--valid_data_path=v"], "--split 9,1", "valid_data_path or test"),
    ("finetune_generation.py", TUNE, "--lora_rank 16", "lora"),
    ("finetune_generation.py", TUNE, "--lora_rank 8", "lora"),
    ("finetune_generation.py", TUNE, "--target_modules q_proj", "lora"),
    ("finetune_generation.py", TUNE, "--lora_dropout 0.3", "lora"),
    ("finetune_generation.py", TUNE, "--use_dora true", "lora"),
    ("finetune_generation.py", TUNE, "--pissa true", "lora"),
    ("finetune_generation.py", [*TUNE, "--lora"], "--pissa_iter 4", "pissa"),
    ("finetune_generation.py", TUNE, "--lora_plus_scale 4", "lora"),
    ("finetune_generation.py", TUNE, "--modules_to_save norm", "lora"),
    ("finetune_generation.py", MEASURE, "--neftune true", "do_train"),
    ("finetune_generation.py", MEASURE, "--neftune_noise_alpha 5", "do_train"),
    ("finetune_generation.py", TUNE, "--base_dtype bfloat16", "lora"),
    ("finetune_generation.py", TUNE, "--weight_quantize_algo weight_only_int8", "lora"),
    ("finetune_generation.py", TUNE, "--num_prefix_tokens 4", "prefix_tuning"),
    (
        "finetune_generation.py",
        [*TUNE, "--prefix_tuning"],
        "--prefix_projection_hidden_size 4",
        "prefix_projection",
    ),
    ("finetune_generation.py", TUNE, "--dpo_beta 0.2", "dpo"),
    ("finetune_generation.py", TUNE, "--qat_type W4", "qat"),
    ("finetune_generation.py", TUNE, "--max_seq_length 64", "packing"),
    ("finetune_generation.py", TUNE, "--metric_for_best_model loss", "load_best_model_at_end"),
    ("finetune_generation.py", TUNE, "--load_best_model_at_end", "do_eval"),
    ("finetune_generation.py", TUNE, "--dev_dataset_path d", "do_eval"),
    ("finetune_generation.py", [*TUNE, "--tgt_length", "5"], "--max_length 2000", "tgt_length"),
    ("evaluate_generation.py", [*EVALUATE, "squad"], "--few_shot_file x", "choices"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--num_few_shot 2", "few_shot_file"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--data_dir d", "ceval or cmmlu"),
    ("evaluate_generation.py", [*EVALUATE, "squad"], "--subjects law", "ceval or cmmlu"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--stride 2", "perplexity"),
    ("evaluate_generation.py", [*EVALUATE, "perplexity"], "--cache_blocks 9", "squad"),
    ("evaluate_generation.py", [*EVALUATE, "squad"], "--predictions_file p", "predictions_file"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--few_shot_seed 3", "gsm8k"),
    ("evaluate_generation.py", [*EVALUATE, "gsm8k"], "--few_shot_seed 3", "few_shot_file"),
    ("evaluate_generation.py", [*EVALUATE, "squad"], "--apply_chat_template", "gsm8k or needle"),
    ("evaluate_generation.py", [*EVALUATE, "gsm8k"], "--context_lengths 64", "needle"),
    ("evaluate_generation.py", [*EVALUATE, "gsm8k"], "--depths 50", "needle"),
    ("evaluate_generation.py", [*EVALUATE, "gsm8k"], "--num_trials 2", "needle"),
    ("evaluate_generation.py", [*EVALUATE, "needle"], "--limit 2", "needle"),
    ("evaluate_generation.py", [*EVALUATE, "needle"], "--batch_size 2", "needle"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--max_answer_tokens 2", "cmrc or gsm8k"),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--stop x", "cmrc or gsm8k"),
    ("predict_generation.py", MODEL, "--model_prefix llama", "model_name_or_path"),
    ("predict_generation.py", MODEL, "--output_file o", "prompt and data_file"),
    ("predict_generation.py", MODEL, "--num_speculative_tokens 5", "draft_model_name_or_path"),
    (
        "predict_generation.py",
        [*MODEL, "--draft_model_name_or_path", "d"],
        "--prompt_lookup_num_tokens 5",
        "draft_model_name_or_path",
    ),
    ("evaluate_generation.py", [*EVALUATE, "choices"], "--prompt_lookup_num_tokens 5", "squad"),
    ("predict_generation.py", MODEL, "--adapter de", "adapters"),
    ("predict_generation.py", [*MODEL, "--lora_path", "l"], "--adapters de=a", "lora_path"),
    ("server.py", ["--no_ui"], "--title x", "no_ui"),
    ("server.py", ["--no_ui"], "--root_path /chat", "no_ui"),
    ("llm.serving.batch", [*BATCH, *MODEL], "--concurrency 4", "api_url"),
    ("llm.serving.batch", [*BATCH, *MODEL], "--max_retries 4", "api_url"),
    ("llm.serving.batch", [*BATCH, *MODEL], "--request_timeout_s 4", "api_url"),
    ("llm.serving.batch", [*BATCH, "--api_url", "http://h"], "--src_length 5", "api_url"),
    ("llm.serving.batch", [*BATCH, "--api_url", "http://h"], "--max_num_seqs 5", "api_url"),
    ("server.py", MODEL, "--log_texts", "access_log"),
    ("server.py", MODEL, "--management_host 0.0.0.0", "management_port"),
    ("server.py", MODEL, "--adapter_dir a", "management_port"),
    ("quantize_generation.py", QUANTIZE, "--group_size 64", "quant_type"),
    ("quantize_generation.py", QUANTIZE, "--eval_limit 5", "eval_file"),
    ("quantize_generation.py", QUANTIZE, "--scaling search", "calibration_file"),
    (
        "quantize_generation.py",
        [*QUANTIZE, "--calibration_file", "f"],
        "--dataset_path d",
        "calibration_file",
    ),
    ("quantize_generation.py", QUANTIZE, "--wide_share 0.1", "quant_type"),
    ("quantize_generation.py", [*QUANTIZE, *W4], "--wide_share 0.1", "calibration_file"),
    ("quantize_generation.py", [*QUANTIZE, "--dequantize"], "--quant_type W8", "dequantize"),
    ("quantize_generation.py", [*QUANTIZE, "--dequantize"], "--embedding_type int8", "dequantize"),
    ("data.prepare", CORPUS, "--src_length 5", "task is not instruct"),
    ("data.prepare", [*CORPUS, "--task", "instruct"], "--workers 2", "task is not pretrain"),
    ("data.prepare", [*CORPUS, "--task", "instruct"], "--shard 1/2", "task is not pretrain"),
    ("evaluate_generation.py", [*EVALUATE, "squad"], "--add_bos_token true", "perplexity"),
]


def groups_of(script: str):
    return PREPARE if script == "data.prepare" else SCRIPTS[script]


@pytest.mark.parametrize(("script", "others", "idle", "names"), IDLE, ids=lambda v: str(v)[:40])
def test_a_flag_whose_mode_is_off_is_refused(script, others, idle, names):
    with pytest.raises(UserError, match=f"^command line: .*{names}.*drop"):
        load(groups_of(script), [*others, *idle.split()], prog=script)


@pytest.mark.parametrize("script", [*SCRIPTS, "data.prepare"])
def test_a_file_may_list_every_default(script, tmp_path):
    groups = groups_of(script)
    # What each script cannot do without, and with which no default is in conflict.
    needed = {
        "run_pretrain.py": {"do_train": True, "max_steps": 1},
        "finetune_generation.py": {"do_train": True, "dataset_path": "d"},
        "evaluate_generation.py": {"task": "choices", "data_file": "f"},
        "quantize_generation.py": {"model_name_or_path": "m", "output_dir": "o"},
        "merge_lora.py": {"model_name_or_path": "m", "lora_path": "l", "output_dir": "o"},
        "convert_checkpoint.py": {"input_dir": "m", "output_dir": "o"},
        "server.py": {"no_ui": True},
        "llm.serving.batch": {"input_file": "i", "output_file": "o", "model_name_or_path": "m"},
        "data.prepare": {"input": "i", "tokenizer": "t", "output_prefix": "o"},
    }.get(script, {"model_name_or_path": "m"})
    defaults = {}
    for group in groups:
        defaults |= vars(group())
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(defaults | needed))
    load(groups, [str(tmp_path / "all.yaml")], prog=script)


def test_a_file_with_another_value_is_refused_unless_the_line_turns_the_mode_off(tmp_path):
    groups, file = SCRIPTS["finetune_generation.py"], tmp_path / "run.yaml"
    file.write_text("dataset_path: d\ndo_train: true\nlora_rank: 16\n")
    with pytest.raises(UserError, match=r"run\.yaml: lora_rank is given but lora is off"):
        load(groups, [str(file)], prog="x")
    file.write_text(file.read_text() + "lora: true\n")
    assert load(groups, [str(file)], prog="x")[2].lora_rank == 16
    tuned = load(groups, [str(file), "--lora", "false"], prog="x")[2]
    assert (tuned.lora, tuned.lora_rank) == (False, 8), "as if the file did not have it"


def test_saying_that_something_is_off_needs_no_mode():
    words = [*TUNE, "--evaluation_strategy", "no", "--rslora", "false", "--lora_alpha", "none"]
    assert load(SCRIPTS["finetune_generation.py"], words, prog="x")[2].mode == "full"


@pytest.mark.parametrize("flag", ["gpu A100", "gpu_memory 40", "gpus_per_node 4"])
def test_the_planner_refuses_gpus_where_none_are_planned(flag):
    words = ["--model_name_or_path", "llama-3.2-1b", "--max_steps", "1", "--device"]
    read_recipe([*words, "gpu", *f"--{flag}".split()])
    with pytest.raises(UserError, match=f"{flag.split()[0]} is given but device is not gpu"):
        read_recipe([*words, "cpu", *f"--{flag}".split()])


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ("", "greedy_search"),
        ("--temperature 0.7", "sampling"),
        ("--temperature 1", "sampling"),
        ("--top_k 4", "sampling"),
        ("--top_p 0.9", "sampling"),
        ("--temperature 0", "greedy_search"),
        ("--top_p 1 --top_k 0", "greedy_search"),
        ("--decode_strategy sampling", "sampling"),
        ("--decode_strategy greedy_search --temperature 0", "greedy_search"),
        ("--num_beams 4", "beam_search"),
        ("--num_beams 1", "greedy_search"),
        ("--decode_strategy beam_search --length_penalty 0", "beam_search"),
    ],
)
def test_who_sets_a_temperature_samples(words, strategy):
    asked = load(SCRIPTS["predict_generation.py"], [*MODEL, *words.split()], prog="x")[2]
    assert asked.decode_strategy == strategy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--decode_strategy greedy_search --top_p 0.9", "greedy_search takes .*top_p=0.9 would"),
        ("--decode_strategy greedy_search --temperature 1", "greedy_search takes .*temperature=1"),
        ("--temperature 0 --top_k 4", "temperature=0 is greedy, and top_k=4 would"),
        ("--decode_strategy sampling --temperature 0", "temperature=0 is .*decode_strategy=samp"),
        ("--num_beams 4 --top_p 0.9", "beam search .*top_p=0.9 would .*; drop it"),
        ("--decode_strategy beam_search --seed 1", "beam search .*seed=1 would"),
        ("--decode_strategy beam_search --num_beams 1", "num_beams=1 is a greedy search"),
        ("--decode_strategy sampling --num_beams 2", "no beam .*num_beams=2 .*add --decode_strat"),
        ("--early_stopping true", "no beam is followed, and early_stopping=True would"),
        ("--num_beams 2 --length_penalty 101", "length_penalty=101.0 has to be between -100"),
    ],
)
def test_settings_of_sampling_beside_a_greedy_search(words, message):
    with pytest.raises(UserError, match=message):
        load(SCRIPTS["predict_generation.py"], [*MODEL, *words.split()], prog="x")


def test_what_counts_as_meant(tmp_path):
    (tmp_path / "c.yaml").write_text("top_k: 0\ntemperature: 0.5\n")
    words = [str(tmp_path / "c.yaml"), *MODEL, "--seed", "42"]
    assert meant(load(SCRIPTS["predict_generation.py"], words, prog="x")[2]) == {
        "temperature",
        "seed",
    }


def test_help_names_the_mode(capsys):
    with pytest.raises(SystemExit):
        load(SCRIPTS["finetune_generation.py"], ["--help"], prog="x")
    assert "rank of the matrices; with lora (default: 8)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_condition_on_an_unknown_setting_is_a_mistake_of_ours():
    from dataclasses import dataclass

    @dataclass
    class Group:
        size: int = arg(1, "size", only_with="missing")

    with pytest.raises(KeyError):
        load([Group], ["--size", "2"], prog="x")
