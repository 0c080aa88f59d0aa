#!/usr/bin/env bash
# Vim-Ti on CIFAR-100 at 224 pixels from scratch, 7 tokens fused in every layer.
# Famba-V, arXiv:2409.09808, table 1, Vim-Ti, "All-layer Fusion".
#
#   GPUS=4 bash scripts/cifar100/vim_tiny_all.sh --data-path /data --output_dir output/vim_tiny_all
#
# Further words are flags of main.py, such as --dry-run.  However many GPUs share it, an update is of
# 128 images.  GPU hours: not yet measured.
set -euo pipefail
cd "$(dirname "$0")/../.."
GPUS=${GPUS:-1}
((128 % GPUS == 0)) || { echo "error: GPUS is $GPUS, expected a divisor of 128" >&2 && exit 2; }

exec torchrun --standalone --nproc-per-node "$GPUS" main.py \
    --model vim_tiny --class-token head --drop-path 0.0 \
    --fusion-strategy all --fusion-token 7 \
    --data-set CIFAR --batch-size $((128 / GPUS)) --epochs 300 \
    --lr 1e-3 --unscale-lr --weight-decay 0.1 --no_amp \
    "$@"
