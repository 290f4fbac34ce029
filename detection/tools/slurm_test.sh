#!/usr/bin/env bash
# Tests under Slurm with GPUS (8) processes, GPUS_PER_NODE on each machine; srun gets SRUN_ARGS.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 4 "slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" "$@"
run_slurm "${GPUS:-8}" "$1" "$2" "$here/test.py" "$3" "$4" "${@:5}"
