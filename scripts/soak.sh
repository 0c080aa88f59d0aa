#!/usr/bin/env bash
# The promises of reliability at full length: more than half an hour of killing,
# interrupting and resuming runs.
#
#   bash scripts/soak.sh [FOLDER]
#
# FOLDER (default output/soak) receives soak.json: what was tried, how often, and what held.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec "$python" -m tests.trust.soak "${1:-output/soak}"
