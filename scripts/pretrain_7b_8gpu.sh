#!/usr/bin/env bash
# Llama 2 7B on 8 GPUs of this machine: tensor parallel 2 x sharding 4. Flags override the recipe's.
set -euo pipefail
cd "$(dirname "$0")/.."

python -u -m paddle.distributed.launch \
    --gpus 0,1,2,3,4,5,6,7 \
    --log_dir outputs/log_7b \
    run_pretrain.py configs/pretrain_llama2_7b_8gpu.yaml "$@"
