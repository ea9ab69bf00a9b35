#!/usr/bin/env bash
# Llama 2 13B on two machines of 8 GPUs: tensor parallel 2 x pipeline 2 x sharding 4. On each machine:
#   MASTER=10.0.0.1:8090 NODE_RANK=0 scripts/pretrain_13b_16gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# What differs between machines; the master is the first one, with any free port.
: "${MASTER:?set MASTER=address:port of the first machine}"
: "${NODE_RANK:?set NODE_RANK=0 on the first machine, then 1, 2, ...}"

python -u -m paddle.distributed.launch \
    --master "$MASTER" \
    --nnodes 2 \
    --rank "$NODE_RANK" \
    --gpus 0,1,2,3,4,5,6,7 \
    --log_dir "outputs/log_13b_node$NODE_RANK" \
    run_pretrain.py configs/pretrain_llama2_13b_16gpu.yaml "$@"
