"""Modes of each script for `tests.fuzz.flags`: command lines that work, with names of places."""

_TRAIN = (
    "--model_name_or_path {model} --input_dir {store} --output_dir {out} --max_seq_length 32 "
    "--split 8,1,1"
)
_FIT = "--do_train --max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2"
_FIT += " --logging_steps 1"
_TUNE = "--model_name_or_path {model} --output_dir {out} --src_length 300 --tgt_length 60"
_SQUAD = "--dataset_path {squad}"
_ASK = "--data_file {prompts} --max_length 6 --ignore_eos --output_file {out}/answers.jsonl"
_SCORE = "--model_name_or_path {model} --task"
_ROUND = "--model_name_or_path {model} --output_dir {out}/new"
_PREPARE = "--tokenizer {model} --output_prefix {out}/s"

MODES: dict[str, dict[str, str]] = {
    "run_pretrain.py": {
        "train": f"{_TRAIN} {_FIT}",
        "train and eval": f"{_TRAIN} {_FIT} --do_eval --evaluation_strategy steps --save_steps 1",
        "on": f"{_TRAIN} {_FIT} --continue_training",
        "resume": f"{_TRAIN} {_FIT} --max_steps 4 --resume_from_checkpoint {{checkpoint}}".replace(
            "--max_steps 2 ", ""
        ),
        "blend": f"{_TRAIN} {_FIT} --do_eval --save_steps 1 --valid_data_path {{store2}}".replace(
            "--input_dir {store}", "--input_dir 1 {store}/s 2 {store2}/s"
        ).replace(" --split 8,1,1", " --evaluation_strategy steps"),
        "eval": f"{_TRAIN} --do_eval --continue_training",
        "predict": f"{_TRAIN} --do_predict --continue_training",
    },
    "finetune_generation.py": {
        "full": f"{_TUNE} {_SQUAD} {_FIT}",
        "full and eval": f"{_TUNE} {_SQUAD} {_FIT} --do_eval --evaluation_strategy steps "
        "--save_steps 1",
        "lora": f"{_TUNE} {_SQUAD} {_FIT} --lora",
        "dora": f"{_TUNE} {_SQUAD} {_FIT} --lora --use_dora --pissa --modules_to_save norm",
        "dpo lora": f"{_TUNE} {_FIT} --dpo --task_name preference --lora --use_dora",
        "lora on": f"{_TUNE} {_SQUAD} {_FIT} --lora --lora_path {{lora}}",
        "prefix": f"{_TUNE} {_SQUAD} {_FIT} --prefix_tuning --num_prefix_tokens 4",
        "dpo": f"{_TUNE} {_FIT} --dpo --task_name preference",
        "packing": f"{_TUNE} {_SQUAD} {_FIT} --packing",
        "qat": f"{_TUNE} {_SQUAD} {_FIT} --qat",
        "eval": f"{_TUNE} {_SQUAD} --do_eval",
        "eval lora": f"{_TUNE} {_SQUAD} --do_eval --lora --lora_path {{lora}}",
    },
    "predict_generation.py": {
        "greedy": f"--model_name_or_path {{ending}} {_ASK}",
        "sampling": f"--model_name_or_path {{ending}} {_ASK} --decode_strategy sampling",
        "program": f"--model_dir {{program}} {_ASK}",
        "chat": f"--model_name_or_path {{ending}} {_ASK} --chat",
        "W8": f"--model_name_or_path {{w8}} {_ASK}",
        "merge": "--model_name_or_path {ranks} --merge_tensor_parallel_path {out}/new",
    },
    "infer_generation.py": {
        "program": f"--model_dir {{program}} {_ASK}",
        "model": f"--model_name_or_path {{ending}} {_ASK}",
    },
    "export_generation_model.py": {
        "model": "--model_name_or_path {model} --output_path {out}/llama --check false",
        "W8": "--model_name_or_path {w8} --output_path {out}/llama --check false",
        "lora": "--model_name_or_path {model} --output_path {out}/llama --check false --lora_path "
        "{lora}",
    },
    "evaluate_generation.py": {
        "perplexity": f"{_SCORE} perplexity --data_file {{lines}}",
        "squad": f"{_SCORE} squad --data_file {{ours}}",
        "choices": f"{_SCORE} choices --data_file {{questions}} --limit 40",
        "ceval": f"{_SCORE} ceval --data_dir {{ceval}} --subjects logic law --num_few_shot 2",
        "cmrc": f"{_SCORE} cmrc --data_file {{ours}}",
        "gsm8k": f"{_SCORE} gsm8k --data_file {{problems}} --few_shot_file {{problems2}} "
        "--num_few_shot 2 --max_answer_tokens 4 --output_file {out}/questions.json",
        "needle": f"{_SCORE} needle --context_lengths 200 --depths 50 --data_file {{text}} "
        "--max_answer_tokens 4 --output_file {out}/questions.json",
        "program": "--model_dir {program} --task perplexity --data_file {lines}",
        "predictions": "--task squad --data_file {squad}/dev.json --predictions_file {predictions}",
    },
    "quantize_generation.py": {
        "W8": _ROUND,
        "W8 gptq": f"{_ROUND} --method gptq --calibration_file {{text}} --calibration_length 64",
        "W4": f"{_ROUND} --quant_type W4 --method rtn --group_size 16 --eval_file {{text}}",
        "W4 gptq": f"{_ROUND} --quant_type W4 --group_size 16 --calibration_file {{text}} "
        "--calibration_length 64",
        "A8W8": f"{_ROUND} --quant_type A8W8 --smooth 0.5 --calibration_file {{text}} "
        "--calibration_length 64",
        "dequantize": "--model_name_or_path {w8} --output_dir {out}/new --dequantize",
    },
    "merge_lora.py": {
        "merge": "--model_name_or_path {model} --lora_path {lora} --output_dir {out}/new",
    },
    "convert_checkpoint.py": {
        "hf": "--input_dir {model} --output_dir {out}/new",
        "ranks": "--input_dir {model} --output_dir {out}/new --output_format pdparams",
        "compare": "--input_dir {model} --output_dir {model2} --check_only",
    },
    "server.py": {
        "api": "--no_ui --flask_port 0 --model_name_or_path {model} --src_length 40 --max_length 8",
        "program": "--no_ui --flask_port 0 --model_dir {program} --src_length 40 --max_length 8",
    },
    "llm.serving.batch": {
        "batch": "--model_name_or_path {model} --input_file {batch} --output_file "
        "{out}/batch.jsonl",
    },
    "data.prepare": {
        "text": f"--input {{text}} {_PREPARE}",
        "lines": f"--input {{lines}} {_PREPARE}",
        "shard": f"--input {{lines}} {_PREPARE} --shard 1/2",
        "instruct": f"--task instruct --input {{squad}}/train.json {_PREPARE}",
    },
    "data.merge": {"two": "--input {store}/s {store2}/s --output_prefix {out}/s"},
    "data.conversations.convert_instruct": {
        "alpaca": "--input {alpaca} --output {out}/new.jsonl",
        "messages": "--input {messages} --output {out}/new.jsonl",
    },
    "data.conversations.make_task": {"words": "--name last-word --output_dir {out}/task"},
    "llm.planner": {
        "gpu": "--model_name_or_path llama-3.2-1b --max_steps 1 --device gpu",
        "cpu": "--model_name_or_path llama-3.2-1b --max_steps 1 --device cpu",
    },
}
