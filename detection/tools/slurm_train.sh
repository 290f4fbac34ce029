#!/usr/bin/env bash
# Trains under Slurm, on GPUS (8) processes with GPUS_PER_NODE on a machine; SRUN_ARGS are handed to srun.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 4 "slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" "$@"
run_slurm "${GPUS:-8}" "$1" "$2" "$here/train.py" "$3" --work-dir "$4" "${@:5}"
