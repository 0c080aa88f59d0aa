#!/usr/bin/env bash
# Sets up .venv if need be and runs every test; arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadgroup "$@"
