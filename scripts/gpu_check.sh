#!/usr/bin/env bash
# Correctness and speed on a GPU, from a bare checkout, in two parts of under 8 minutes.
#
#   bash scripts/gpu_check.sh [--more] [--only STEP] [--dry] [FOLDER]
#
# FOLDER (default output/gpu_check) receives a JSON file after every step (tests: a JUnit XML file, and a line
# of JSON after each test) and a line for each in steps.jsonl, so that an early stop loses nothing.  --more runs the second part, of lower priority; --only
# runs one step of either; --dry runs each step on a CPU, with tiny sizes and Triton's interpreter.
# Needs a CUDA build of torch, the packages of pyproject.toml and pytest in $PYTHON (default python3);
# installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
python=${PYTHON:-python3}
total=470 # seconds; the limits of a part's steps add up to no more
more= only= dry= out=output/gpu_check
steps="check_norm check_conv check_gate check_match check_pool check_scan check_mixer check_training"
steps+=" scan step strategies infer latency roofline"
later="reduction data block smoke smoke_graphs tests scan_small step_small block_small kernels check_scan_forms"
later+=" kernels_float32"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --only)
        only=${2:-}
        [[ " $steps $later " == *" $only "* ]] || fail "--only is '$only', expected one of $steps $later"
        shift
        ;;
    --more) more=1 ;;
    --dry) dry=1 ;;
    -*) fail "option is $1, expected --more, --only or --dry" ;;
    *) out=$1 ;;
    esac
    shift
done
mkdir -p "$out"
[ -n "$only$more" ] || rm -f "$out/steps.jsonl"
[ -z "$more" ] || steps=$later
[ -z "$only" ] || steps=$only
if [ -z "$dry" ]; then
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
        fail "no CUDA device is visible to $python, expected one; --dry needs none"
fi
SECONDS=0 # the first import of torch on a new machine is not counted

failed=0
step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((total - SECONDS)) began=$SECONDS status=0
    shift 2
    [[ " $steps " == *" $name "* ]] || return
    [ -n "$dry" ] && left=600 limit=600
    [ "$left" -lt "$limit" ] && limit=$left
    echo "== $name"
    if [ "$limit" -gt 0 ]; then timeout -k 10 "$limit" "$@" || status=$?; else status=124; fi
    [ "$status" = 0 ] || failed=1
    printf '{"step": "%s", "status": %d, "seconds": %d, "limit": %d}\n' \
        "$name" "$status" $((SECONDS - began)) "$limit" >>"$out/steps.jsonl"
}
bench() { # NAME SECONDS KIND FLAGS...
    local name=$1 limit=$2 kind=$3
    shift 3
    step "$name" "$limit" "$python" -m fambav bench "$kind" --device "$device" "$@" --json "$out/$name.json"
}
script() { # NAME SECONDS FILE FLAGS...
    local name=$1 limit=$2 file=$3
    shift 3
    step "$name" "$limit" "$python" "benchmarks/$file.py" --device "$device" "$@" --json "$out/$name.json"
}
check() { # NAME SECONDS EXPRESSION FILES...
    local name=$1 limit=$2 which=$3
    shift 3
    # Only pytest is required: settings of plugins that are not installed are ignored.
    step "$name" "$limit" "$python" -m pytest -p no:cacheprovider -W ignore::pytest.PytestConfigWarning -rP \
        -m "$mark" -k "$which" --junitxml "$out/$name.xml" "$@"
}
smoke() { # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    [[ " $steps " == *" $name "* ]] || return
    step "$name" "$limit" "$python" main.py --device "$device" --data-set FAKE --epochs 1 "${small[@]}" \
        --output_dir "$out/$name" "$@"
    [ -f "$out/$name/log.txt" ] && "$python" -c '
import json, pathlib, sys
run, target = map(pathlib.Path, sys.argv[1:])
epochs = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
summary = {"environment": json.loads((run / "env.json").read_text()), "epochs": epochs}
target.write_text(json.dumps(summary, indent=1))' "$out/$name" "$out/$name.json"
}

declare -A files=(
    [norm]=tests/ops/test_add_rms_norm.py [conv]=tests/ops/test_triton_conv.py [gate]=tests/ops/test_triton_gate.py
    [match]=tests/ops/test_match.py [pool]=tests/ops/test_pool.py [scan]=tests/ops/test_triton_scan.py
    [mixer]=tests/ops/test_bimamba.py [training]=tests/engine/test_determinism.py
)
if [ -n "$dry" ]; then
    device=cpu mark="not gpu"
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    few=(--rounds 1 --warmup 0 --batch 1)
    small=(--model vim_micro --input-size 16 --batch-size 64 --num_workers 0 --no-model-ema --drop-path 0.1)
    scan=(scan "${few[@]}" --length 5 3 --state 4 --backend triton cuda numba cpu reference)
    block=(block "${few[@]}" --model vim_micro --length 5 3)
    step=(step "${few[@]}" --model vim_micro --length 10 5)
    forward=(--batch 1 --rounds 1 --warmup 0 --model vim_micro --plan none upper:3:9 --peer deit_tiny_patch16_224 --roofline --profile)
    kernels=(kernels "${few[@]}" --length 3 --dim 32 --state 4 --blocks 32 --warps 1)
    for op in norm conv gate match pool scan mixer; do
        check "check_$op" 1 "every_length and 2-torch.float32 or every_length and 5-torch.float32" "${files[$op]}"
    done
    check check_scan_forms 1 "forms_in_turn[2-" "${files[scan]}"
    check check_training 1 "" "${files[training]}"
    bench scan 1 "${scan[@]}" --dim 32
    bench step 1 "${step[@]}"
    bench strategies 1 strategies "${few[@]}" --model vim_micro --plan upper:3:9 all:1
    bench infer 1 infer "${forward[@]}"
    bench latency 1 latency "${forward[@]:2}"
    bench reduction 1 reduction "${few[@]}" --model vim_micro
    bench data 1 data --batch 2 --batches 1 --rounds 1 --warmup 0 --workers 0 --input-size 32
    script roofline 1 roofline "${few[@]}"
    bench block 1 "${block[@]}"
    smoke smoke 1
    step smoke_graphs 1 bash -c '"$@"; [ $? = 2 ]' refused "$python" main.py --device cpu --data-set FAKE --cuda-graphs
    script kernels 1 "${kernels[@]}" --dtype bfloat16
    bench scan_small 1 "${scan[@]}" --dim 64
    bench step_small 1 "${step[@]}"
    bench block_small 1 "${block[@]}"
    check tests 1 "gpu_times_launches or first_call" tests/bench/test_timing.py
    script kernels_float32 1 "${kernels[@]}" --dtype float32
else
    device=cuda mark=gpu
    small=(--model vim_tiny --batch-size 64 --num_workers 8 --fusion-strategy upper --fusion-layer 6 --fusion-token 9)
    forward=(--plan none upper:6:9 all:7 --peer deit_tiny_patch16_224 --cuda-graphs --roofline --profile)
    for op in norm conv gate match pool; do
        check "check_$op" 20 every_length "${files[$op]}"
    done
    check check_scan 70 "every_length and not forms" "${files[scan]}"
    check check_mixer 25 every_length "${files[mixer]}"
    check check_training 45 "" "${files[training]}"
    bench scan 30 scan
    bench step 40 step --cuda-graphs
    bench strategies 60 strategies --cuda-graphs
    bench infer 35 infer "${forward[@]}"
    bench latency 25 latency "${forward[@]}"
    script roofline 40 roofline

    bench reduction 40 reduction
    bench data 30 data --workers 0 1 8
    bench block 30 block
    smoke smoke 30
    smoke smoke_graphs 30 --cuda-graphs
    check tests 60 "not every_length and not determinism" tests
    bench scan_small 25 scan --dim 768
    bench step_small 40 step --model vim_small --cuda-graphs
    bench block_small 30 block --model vim_small
    script kernels 50 kernels --dtype bfloat16 --kernel scan_forward scan_backward
    check check_scan_forms 85 "forms_in_turn" "${files[scan]}"
    script kernels_float32 20 kernels --dtype float32 --kernel scan_forward scan_backward
fi
cat "$out/steps.jsonl"
exit $failed
