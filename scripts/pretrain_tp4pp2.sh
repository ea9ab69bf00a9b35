#!/usr/bin/env bash
# Llama 7B on 8 GPUs of this machine: tensor parallel 4 x pipeline 2. Flags after the script's name
# override the recipe's, such as --input_dir and --tokenizer_name_or_path.
set -euo pipefail
cd "$(dirname "$0")/.."

python -u -m paddle.distributed.launch \
    --gpus 0,1,2,3,4,5,6,7 \
    --log_dir outputs/log_tp4pp2 \
    run_pretrain.py configs/pretrain_llama_7b_tp4pp2_gpu.yaml "$@"
