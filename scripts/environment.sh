#!/usr/bin/env bash
# Makes .venv from vim_requirements.txt if it is missing or older than what the project asks for.
# Sourced by the other scripts; leaves the interpreter's path in $python.  Needs no compiler and no GPU.
#
#   PYTHON=/path/to/python3.12 bash scripts/quickstart.sh     another interpreter for a new .venv

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="$PWD/.venv/bin/python"
stamp=.venv/.fambav-installed

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

wanted=$(cat vim_requirements.txt pyproject.toml | sha256sum)
if [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "python is ${base}, expected an interpreter of Python 3.11 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "python is $("$base" -V 2>&1), expected Python 3.11 or newer; set PYTHON to one"
    if [ ! -x "$python" ]; then
        "$base" -m venv .venv ||
            fail "venv is missing from $base, expected the standard module; on Debian: apt install python3-venv"
    fi
    printf 'setting up .venv (once; about 0.4 GB with a CPU build of torch, 5 GB with CUDA)\n'
    "$python" -m pip install --quiet --disable-pip-version-check -r vim_requirements.txt &&
        "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e . ||
        fail "the packages of vim_requirements.txt could not be installed, expected a package index that pip can reach"
    printf '%s' "$wanted" >"$stamp"
fi
