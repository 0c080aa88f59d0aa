#!/usr/bin/env bash
# Builds mamba-ssm and causal-conv1d for this machine's GPU, to compare with, without a network.
#
#   bash scripts/build_cuda_peers.sh [--dry-run] SDIST_DIR OUT_DIR
#   PYTHONPATH=OUT_DIR python3 -m fambav doctor      then finds them
#
# SDIST_DIR holds one mamba_ssm-*.tar.gz and one causal_conv1d-*.tar.gz, as from
#   MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download --no-deps \
#       --no-build-isolation --no-binary :all: -d SDIST_DIR mamba-ssm causal-conv1d
# Needs nvcc and, in $PYTHON (default python3), a CUDA build of torch, setuptools, wheel, packaging and,
# to be quick, ninja.  Their setup.py compiles for nine architectures, whatever TORCH_CUDA_ARCH_LIST says; a
# scratch copy is edited to compile for one: that of the GPU, or $CUDA_ARCH (such as 90).  --dry-run unpacks,
# edits, and prints what would run.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
[ $# = 2 ] || fail "arguments are ${*:-missing}, expected [--dry-run] SDIST_DIR OUT_DIR"
[ -d "$1" ] || fail "SDIST_DIR is $1, expected a folder that exists"
sdists=$(cd "$1" && pwd)
out=$(realpath -m "$2")
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "PYTHON is $python, expected an interpreter"
arch=${CUDA_ARCH:-$("$python" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null)} ||
    fail "GPU is missing, expected one that torch of $python sees; or set CUDA_ARCH, such as 90"
[[ $arch =~ ^[0-9]+$ ]] || fail "CUDA_ARCH is $arch, expected a number such as 90"
command -v nvcc >/dev/null || fail "nvcc is missing, expected it on the PATH"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=(mamba_ssm causal_conv1d)
for package in "${packages[@]}"; do
    sdist=("$sdists/$package"-*.tar.gz)
    [ ${#sdist[@]} = 1 ] && [ -f "${sdist[0]}" ] ||
        fail "SDIST_DIR is $sdists, expected one $package-*.tar.gz in it"
    mkdir "$work/$package"
    tar -xzf "${sdist[0]}" -C "$work/$package" --strip-components 1 ||
        fail "sdist is ${sdist[0]}, expected a gzipped tar archive"
    named=$(grep -c 'cc_flag\.append("arch=' "$work/$package/setup.py") ||
        fail "setup.py of ${sdist[0]} names no architecture, expected lines cc_flag.append(\"arch=...\")"
    sed -i -E -e 's/cc_flag\.append\("-gencode"\)/pass/' \
        -e "s/cc_flag\.append\(\"arch=[^\"]*\"\)/cc_flag[:] = [\"-gencode\", \"arch=compute_$arch,code=sm_$arch\"]/" \
        "$work/$package/setup.py"
    "$python" -m py_compile "$work/$package/setup.py" || fail "setup.py of $package is no Python after the edit"
    echo "$package: $named architectures in setup.py become sm_$arch"
done

# Otherwise both try to download a wheel first; newer mamba-ssm builds no kernels without the last variable.
export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE
wheel=("$python" -m pip wheel --no-index --no-deps --no-build-isolation)
install=("$python" -m pip install --no-index --no-deps --upgrade --target "$out")
if [ "$dry" ]; then
    for package in "${packages[@]}"; do
        echo "${wheel[*]} --wheel-dir SCRATCH/wheels SCRATCH/$package &"
    done
    echo "${install[*]} SCRATCH/wheels/*.whl"
    exit
fi

mkdir -p "$out"
builds=()
for package in "${packages[@]}"; do # at once: one file takes most of the time, on one core
    "${wheel[@]}" --wheel-dir "$work/wheels" "$work/$package" >"$out/$package.log" 2>&1 &
    builds+=($!)
done
for n in "${!packages[@]}"; do
    wait "${builds[n]}" || failed="${failed:-} ${packages[n]}"
done
[ -z "${failed:-}" ] || fail "build failed of$failed, expected wheels; see the logs in $out"
"${install[@]}" --quiet "$work"/wheels/*.whl || fail "wheels could not be installed into $out"
PYTHONPATH="$out" "$python" -c 'import torch, selective_scan_cuda, causal_conv1d_cuda, causal_conv1d' ||
    fail "what was built cannot be imported, expected it to; see the logs in $out"
echo "built in $SECONDS s; use them by PYTHONPATH=$out"
