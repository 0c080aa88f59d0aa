#!/usr/bin/env bash
# Correctness and speed on a GPU, from a bare checkout, in under 8 minutes.
#
#   bash scripts/gpu_check.sh [FOLDER]     FOLDER receives the results (default output/gpu_check)
#
# Needs a CUDA build of torch and the packages of pyproject.toml in $PYTHON (default python3);
# installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${1:-output/gpu_check}
mkdir -p "$out"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "error: no CUDA device is visible to $python, expected one" >&2
    exit 2
}
failed=0
step() {
    echo "== $1"
    shift
    "$@" || failed=1
}
step "what can run here" "$python" -m fambav doctor
step "tests that need a GPU" timeout 180 "$python" -m pytest -m gpu -p no:cacheprovider
step "scan" timeout 60 "$python" -m fambav bench scan --device cuda --json "$out/scan.json"
for strategy in none upper; do
    fuse=(--fusion-strategy "$strategy")
    [ "$strategy" = upper ] && fuse+=(--fusion-layer 6 --fusion-token 9)
    step "vim_tiny at 224, $strategy" timeout 120 "$python" main.py --model vim_tiny --data-set FAKE \
        --epochs 1 --batch-size 64 --num_workers 8 --drop-path 0 "${fuse[@]}" --output_dir "$out/vim_tiny_$strategy"
done
exit $failed
