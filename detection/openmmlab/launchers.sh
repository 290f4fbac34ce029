# Starts a tool on several processes; sourced by dist_*.sh and slurm_*.sh of detection and segmentation.

# run_distributed TOOL PROCESSES ARGUMENTS...: run on this machine, as node NODE_RANK of NNODES.
run_distributed() {
    local tool=$1 processes=$2
    shift 2
    if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
        echo "error: the number of processes must be a positive number, got '$processes'" >&2
        exit 2
    fi
    exec python -m torch.distributed.run \
        --nnodes="${NNODES:-1}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${PORT:-29500}" \
        --nproc_per_node="$processes" \
        "$tool" "$@" --launcher pytorch
}

# run_slurm GPUS PARTITION JOB_NAME TOOL ARGUMENTS...: run one process per GPU, GPUS_PER_NODE on each machine.
run_slurm() {
    local gpus=$1 partition=$2 job=$3 tool=$4
    shift 4
    local per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    # SRUN_ARGS is a list of options, so it must be split into words.
    # shellcheck disable=SC2086
    exec srun -p "$partition" \
        --job-name="$job" \
        --gres="gpu:$per_node" \
        --ntasks="$gpus" \
        --ntasks-per-node="$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${SRUN_ARGS:-} \
        python -u "$tool" "$@" --launcher slurm
}

# require COUNT USAGE ARGUMENTS...: exit with one line if there are fewer than COUNT arguments.
require() {
    local count=$1 usage=$2
    shift 2
    if (($# < count)); then
        echo "usage: $usage" >&2
        exit 2
    fi
}
