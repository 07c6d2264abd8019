#!/bin/bash
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
# The same under SLURM, from the repository, in an environment where python has it installed:
#
#   sbatch --nodes=8 experiments/cluster/slurm.sh exp=study-large run.root=/shared/runs
#
# A task a node, which starts the ranks. Queued again, the job goes on.
set -euo pipefail
NODES=$SLURM_NNODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${hosts%%$'\n'*}
JOB=$SLURM_JOB_ID
PORT=$((20000 + SLURM_JOB_ID % 20000))
export NODES HEAD JOB PORT
srun --kill-on-bad-exit=1 bash experiments/cluster/node.sh "$@"
