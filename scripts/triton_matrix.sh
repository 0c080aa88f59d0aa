#!/usr/bin/env bash
# The kernels under the oldest and the newest Triton they are written for, without a GPU.
#
#   bash scripts/triton_matrix.sh [FOLDER]     FOLDER receives versions, logs and tables (default output/triton_matrix)
#
# For each version: the tests that run kernels in Triton's interpreter, and benchmarks/aot.py against the recorded
# table, where for another version than the recorded one only spills and more than twice the registers are
# regressions.  A version is installed into a folder on PYTHONPATH before .venv, so that torch is not fetched again.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
out=$(realpath -m "${1:-output/triton_matrix}")
export PYTHONPATH OMP_NUM_THREADS=1
versions=("triton==3.6.0 numpy<2.4" "triton==3.9.0") # 3.6's interpreter fails with numpy 2.4
tests=(tests/ops/test_triton_*.py tests/ops/test_match.py tests/ops/test_pool.py)

status=0
table=$(printf '%-8s%-8s%-62s%s' triton numpy "interpreter tests" "aot.py")
for wanted in "${versions[@]}"; do
    read -ra packages <<<"$wanted"
    here="$out/${packages[0]/==/-}"
    if [ "$wanted" != "$(cat "$here/.installed" 2>/dev/null)" ]; then
        rm -rf "$here"
        mkdir -p "$here"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$here" "${packages[@]}" ||
            fail "$wanted could not be installed, expected a package index that pip can reach"
        printf '%s' "$wanted" >"$here/.installed"
    fi
    PYTHONPATH="$here:$PWD"
    "$python" -m pytest -p no:cacheprovider -k triton -W "ignore:Conversion of an array:DeprecationWarning" \
        "${tests[@]}" >"$here.tests.log" 2>&1 || status=1 # the warning is about 3.6's own code
    tested=$(tail -n 1 "$here.tests.log")
    if env -u TRITON_INTERPRET TRITON_CACHE_DIR="$here.cache" "$python" benchmarks/aot.py \
        --against benchmarks/aot.json --json "$here.json" >"$here.aot.log" 2>&1; then
        compiled="nothing is worse"
    else
        compiled=$(tail -n 1 "$here.aot.log")
        status=1
    fi
    version=$("$python" -c 'import numpy, triton; print(f"{triton.__version__:<8}{numpy.__version__:<8}")')
    table+=$(printf '\n%s%-62s%s' "$version" "$tested" "$compiled")
done
printf '%s\n\nlogs and tables are in %s\n' "$table" "$out"
exit $status
