#!/usr/bin/env bash
# Correctness and speed on a GPU, from a bare checkout, in under 8 minutes.
#
#   bash scripts/gpu_check.sh [--only STEP] [--dry] [FOLDER]
#
# FOLDER (default output/gpu_check) receives a JSON file after every step, and in steps.jsonl a line
# for each: an early stop loses nothing.  --only runs one step; --dry runs each to its end on a CPU,
# with tiny sizes and Triton's interpreter.
# Needs a CUDA build of torch and the packages of pyproject.toml in $PYTHON (default python3);
# installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
python=${PYTHON:-python3}
total=470
only= dry= out=output/gpu_check
steps="check_scan check_kernels check_training scan step strategies infer latency reduction data floors block smoke"
steps+=" smoke_graphs sweep scan_small step_small block_small tests sweep_float32"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --only)
        only=${2:-}
        [[ " $steps " == *" $only "* ]] || fail "--only is '$only', expected one of $steps"
        shift
        ;;
    --dry) dry=1 ;;
    -*) fail "option is $1, expected --only or --dry" ;;
    *) out=$1 ;;
    esac
    shift
done
mkdir -p "$out"
[ -n "$only" ] || rm -f "$out/steps.jsonl"
if [ -z "$dry" ]; then
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
        fail "no CUDA device is visible to $python, expected one; --dry needs none"
fi

failed=0
step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((total - SECONDS)) began=$SECONDS status=0
    shift 2
    [ -n "$only" ] && [ "$only" != "$name" ] && return
    [ -n "$dry" ] && left=600 limit=600
    [ "$left" -lt "$limit" ] && limit=$left
    echo "== $name"
    if [ "$limit" -gt 0 ]; then timeout "$limit" "$@" || status=$?; else status=124; fi
    [ "$status" = 0 ] || failed=1
    printf '{"step": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
        "$name" "$status" $((SECONDS - began)) "$limit" >>"$out/steps.jsonl"
}
bench() { # NAME SECONDS KIND FLAGS...
    local name=$1 limit=$2 kind=$3
    shift 3
    step "$name" "$limit" "$python" -m fambav bench "$kind" --device "$device" "$@" --json "$out/$name.json"
}
smoke() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" main.py --device "$device" --data-set FAKE --epochs 1 "${small[@]}" \
        --output_dir "$out/$name" "$@"
    [ -f "$out/$name/log.txt" ] && "$python" -c '
import json, pathlib, sys
run, target = map(pathlib.Path, sys.argv[1:])
epochs = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
told = {"environment": json.loads((run / "env.json").read_text()), "epochs": epochs}
target.write_text(json.dumps(told, indent=1))' "$out/$name" "$out/$name.json"
}

if [ -n "$dry" ]; then
    device=cpu
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    few=(--rounds 1 --warmup 0 --batch 1)
    small=(--model vim_micro --input-size 16 --batch-size 64 --num_workers 0 --no-model-ema --drop-path 0.1)
    scan=(scan "${few[@]}" --length 5 3 --state 4 --backend triton cuda numba cpu reference)
    block=(block "${few[@]}" --model vim_micro --length 5 3)
    step=(step "${few[@]}" --model vim_micro --length 10 5)
    forward=(--batch 1 --rounds 1 --warmup 0 --model vim_micro --plan none upper:3:9 --peer deit_tiny_patch16_224 --ceilings --split)
    sweep=(sweep "${few[@]}" --length 3 --dim 32 --state 4 --blocks 32 --warps 1)
    bench check_scan 1 check --part scan --length 2 --dtype float32
    bench check_kernels 1 check --part scan_forms conv gate norm match pool mixer --length 5 --dtype float32
    bench check_training 1 check --part training --updates 2 --batch 2
    bench scan 1 "${scan[@]}" --dim 32
    bench step 1 "${step[@]}"
    bench strategies 1 strategies "${few[@]}" --model vim_micro --plan upper:3:9 all:1
    bench infer 1 infer "${forward[@]}"
    bench latency 1 latency "${forward[@]:2}"
    bench reduction 1 reduction "${few[@]}" --model vim_micro
    bench data 1 data --batch 2 --batches 1 --rounds 1 --warmup 0 --workers 0 --input-size 32
    bench floors 1 floors "${few[@]}"
    bench block 1 "${block[@]}"
    smoke smoke 1
    step smoke_graphs 1 bash -c '"$@"; [ $? = 2 ]' refused "$python" main.py --device cpu --data-set FAKE --cuda-graphs
    bench sweep 1 "${sweep[@]}" --dtype bfloat16
    bench scan_small 1 "${scan[@]}" --dim 64
    bench step_small 1 "${step[@]}"
    bench block_small 1 "${block[@]}"
    step tests 1 "$python" -c 'import pytest, pytest_timeout'
    bench sweep_float32 1 "${sweep[@]}" --dtype float32
else
    device=cuda
    small=(--model vim_tiny --batch-size 64 --num_workers 8 --fusion-strategy upper --fusion-layer 6 --fusion-token 9)
    forward=(--plan none upper:6:9 all:7 --peer deit_tiny_patch16_224 --cuda-graphs --ceilings --split)
    bench check_scan 80 check --part scan
    bench check_kernels 70 check --part scan_forms scan_large conv gate norm match pool mixer
    bench check_training 60 check --part training
    bench scan 40 scan
    bench step 50 step --cuda-graphs
    bench strategies 60 strategies
    bench infer 45 infer "${forward[@]}"
    bench latency 35 latency "${forward[@]}"
    bench reduction 40 reduction
    bench data 40 data --workers 0 1 8
    bench floors 45 floors
    bench block 40 block
    smoke smoke 40
    smoke smoke_graphs 40 --cuda-graphs
    bench sweep 75 sweep --dtype bfloat16
    bench scan_small 40 scan --dim 768
    bench step_small 50 step --model vim_small --cuda-graphs
    bench block_small 40 block --model vim_small
    # A pytest that is absent or does not know our settings is no failure of the kernels.
    step tests 60 bash -c '"$1" -c "import pytest, pytest_timeout" || exit 0; "$1" -m pytest -m gpu -p no:cacheprovider' tests "$python"
    bench sweep_float32 75 sweep --dtype float32
fi
cat "$out/steps.jsonl"
exit $failed
