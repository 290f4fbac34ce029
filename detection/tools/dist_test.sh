#!/usr/bin/env bash
# Tests on several processes of this machine (or of NNODES; NODE_RANK, MASTER_ADDR and PORT tell which and where).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 3 "dist_test.sh CONFIG CHECKPOINT PROCESSES [options of test.py]" "$@"
run_distributed "$here/test.py" "$3" "$1" "$2" "${@:4}"
