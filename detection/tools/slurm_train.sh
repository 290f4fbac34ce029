#!/usr/bin/env bash
# Trains under Slurm with GPUS (8) processes, GPUS_PER_NODE on each machine; srun gets SRUN_ARGS.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../openmmlab/launchers.sh"
require 4 "slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" "$@"
run_slurm "${GPUS:-8}" "$1" "$2" "$here/train.py" "$3" --work-dir "$4" "${@:5}"
