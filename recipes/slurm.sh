#!/bin/bash
#SBATCH --job-name=timm-alignmix
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8     # one process per GPU, as many as --gpus-per-node
#SBATCH --cpus-per-task=12      # give --workers about as many
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300       # to the processes, 300 s before the limit: finish the step, save, exit with 75
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#
# Train on Slurm, on one node or many, and go on after time limits and pre-emption until the run is complete:
#
#   sbatch recipes/slurm.sh -c imagenet/resnet50_300ep --mix densemultimix --data-dir /data/imagenet_beton
#   sbatch --nodes 1 recipes/slurm.sh ...
#
# Submit from the clone. All words after the script go to train_imagenet.py; options of sbatch before it win over those
# above. EXPERIMENT names the run's folder (default: job name and number, which a requeued job keeps), PYTHON the
# interpreter (default: .venv/bin/python of the clone). The output folder and the data must be seen by all nodes.
#
# srun starts the processes itself, so that signals reach each of them and exit codes come back: accelerate launch keeps
# SIGUSR1 from them and turns every failure into 1. The GPUs of a node are left visible to all its processes, which
# choose by LOCAL_RANK: do not add --gpus-per-task.
#
# NCCL, where the first step hangs or is slow (NCCL_DEBUG=INFO shows what it chose):
#   export NCCL_SOCKET_IFNAME=ib0    the network interface between nodes, where it takes the wrong one
#   export NCCL_IB_DISABLE=1         sockets instead of InfiniBand, to find out whether that is at fault
# A node that dies ends the others within --dist-timeout seconds (600); the job then fails, and the same sbatch command
# with the same EXPERIMENT continues it.
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1

EXPERIMENT=${EXPERIMENT:-$SLURM_JOB_NAME-$SLURM_JOB_ID}
export PYTHON=${PYTHON:-.venv/bin/python}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

code=0
# One process that ends takes the others with it only after --wait seconds, so that all can save and exit with 75.
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "$PYTHON" train_imagenet.py "$@"' bash --experiment "$EXPERIMENT" --resume auto "$@" || code=$?

if [ "$code" -eq 75 ]; then
    echo "Stopped and saved: requeueing job $SLURM_JOB_ID as $EXPERIMENT"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
