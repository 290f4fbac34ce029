#!/usr/bin/env bash
# Tests with several processes on this machine, or on NNODES machines with NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../../detection/openmmlab/launchers.sh"
require 3 "dist_test.sh CONFIG CHECKPOINT PROCESSES [options of test.py]" "$@"
run_distributed "$here/test.py" "$3" "$1" "$2" "${@:4}"
