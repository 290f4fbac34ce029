#!/usr/bin/env bash
# Trains with several processes on this machine, or on NNODES machines with NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 2 "dist_train.sh CONFIG PROCESSES [options of train.py]" "$@"
run_distributed "$here/train.py" "$2" "$1" "${@:3}"
