#!/usr/bin/env bash
# A rehearsal on this machine's CPU, four processes: tensor parallel 2 x pipeline 2 of a tiny model. The
# layout, the messages and the checkpoints are those of a cluster; the speed is not. For example
#   scripts/rehearse_tp2pp2_cpu.sh --input_dir corpus --max_steps 4
set -euo pipefail
cd "$(dirname "$0")/.."

python -u -m paddle.distributed.launch \
    --nproc_per_node 4 \
    --log_dir outputs/log_rehearsal \
    run_pretrain.py configs/pretrain_tiny_tp2pp2_cpu.yaml "$@"
