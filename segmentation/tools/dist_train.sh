#!/usr/bin/env bash
# Trains on several processes of this machine (or of NNODES; NODE_RANK, MASTER_ADDR and PORT tell which and where).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../../detection/openmmlab/launchers.sh"
require 2 "dist_train.sh CONFIG PROCESSES [options of train.py]" "$@"
run_distributed "$here/train.py" "$2" "$1" "${@:3}"
