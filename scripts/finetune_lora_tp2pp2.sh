#!/usr/bin/env bash
# LoRA on Llama 3.1 70B on 4 GPUs of this machine: tensor parallel 2 x pipeline 2. Flags override the
# recipe's, such as --model_name_or_path and --dataset_path.
set -euo pipefail
cd "$(dirname "$0")/.."

python -u -m paddle.distributed.launch \
    --gpus 0,1,2,3 \
    --log_dir outputs/log_lora_tp2pp2 \
    finetune_generation.py configs/finetune_llama3.1_70b_lora_tp2pp2_gpu.yaml "$@"
