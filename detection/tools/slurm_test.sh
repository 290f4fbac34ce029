#!/usr/bin/env bash
# Tests under Slurm, on GPUS (8) processes with GPUS_PER_NODE on a machine; SRUN_ARGS are handed to srun.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 4 "slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" "$@"
run_slurm "${GPUS:-8}" "$1" "$2" "$here/test.py" "$3" "$4" "${@:5}"
