#!/usr/bin/env bash
# Stress test of reliability: more than half an hour of killing, interrupting and resuming runs.
#
#   bash scripts/soak.sh [FOLDER]
#
# FOLDER (default output/soak) receives soak.json: each check with its trials and result.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "$python" -m tests.trust.soak "${1:-output/soak}"
