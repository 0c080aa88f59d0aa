#!/usr/bin/env bash
# Format, lint, types, documentation and tests.
#
#   bash scripts/check.sh              everything
#   bash scripts/check.sh --fast       without the tests marked slow
#   bash scripts/check.sh --no-tests   format, lint, types and documentation only
set -euo pipefail
source "$(dirname "$0")/environment.sh"
mode=${1:-}
case $mode in
"" | --fast | --no-tests) ;;
*) fail "option is $mode, expected --fast or --no-tests" ;;
esac

"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy fambav main.py benchmarks/*.py
"$python" -m pip check --quiet
NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict --quiet
case $mode in
"") "$python" -m pytest -n auto --maxprocesses 8 --dist loadgroup ;;
--fast) "$python" -m pytest -n auto --maxprocesses 8 --dist loadgroup -m "not slow" ;;
esac
