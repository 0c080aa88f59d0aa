#!/usr/bin/env bash
# From a fresh checkout to a result: sets up .venv, trains a small Vim on real images (scikit-learn's
# handwritten digits) without and with token fusion, compares the two, and draws what was fused.  Uses
# a GPU if there is one.
set -euo pipefail
SECONDS=0
source "$(dirname "$0")/environment.sh"
setup=$SECONDS
runs=output/quickstart-$(date +%Y%m%d-%H%M%S)

SECONDS=0
"$python" main.py --config configs/digits/vim_micro.yaml --output_dir "$runs/unfused"
unfused=$SECONDS

SECONDS=0
"$python" main.py --config configs/digits/vim_micro_upper.yaml --output_dir "$runs/upper"
fused=$SECONDS

echo
"$python" -m fambav table "$runs/unfused" "$runs/upper"
echo
"$python" -m fambav show "$runs/upper" --output_dir "$runs/pictures"
echo
"$python" -m fambav report "$runs/unfused" "$runs/upper" --output "$runs/report.html"
echo
echo "set-up $setup s, run without fusion $unfused s, run with fusion $fused s (imports and evaluation included)"
echo "everything is in $runs: look at $runs/report.html, or try  .venv/bin/fambav predict $runs/upper/best_checkpoint.pth IMAGE"
