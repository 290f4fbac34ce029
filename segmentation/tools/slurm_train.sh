#!/usr/bin/env bash
# Trains under Slurm with GPUS (4) processes, GPUS_PER_NODE on each machine; srun gets SRUN_ARGS.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/../../detection/openmmlab/launchers.sh"
require 3 "slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]" "$@"
run_slurm "${GPUS:-4}" "$1" "$2" "$here/train.py" "$3" "${@:4}"
