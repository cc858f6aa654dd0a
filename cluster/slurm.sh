#!/bin/bash
# A study on the GPUs of several nodes: sbatch cluster/slurm.sh gemma-3-270m
# The folder of the project, with its .venv (pip install -e '.[cluster,gemma-3-270m]'), lies on a disk that all nodes share.
#SBATCH --job-name=gsm8k_sft
#SBATCH --nodes=2
#SBATCH --exclusive # two Rays of one user on a node get into each other's way
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
set -eu
study=${1:?which study? sbatch cluster/slurm.sh gemma-3-270m}
cd "${SLURM_SUBMIT_DIR:-.}"
export PATH=$PWD/.venv/bin:$PATH
# Only processes that know ~/.ray/auth_token may talk to this cluster.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > /dev/null
# This script runs on the first node, which is the head; Slurm ends what it has started when it ends.
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$((20000 + SLURM_JOB_ID % 10000))
ray start --head --port="${head#*:}" --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false
others=$((SLURM_NNODES - 1))
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --cpus-per-task="$SLURM_CPUS_PER_TASK" --exclude="$SLURMD_NODENAME" \
    ray start --address="$head" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi
# MINUTES ends before Slurm's limit, so that trainings leave checkpoints; the same command goes on from them.
python -m gsm8k_sft.experiments.runner "$study" --ray "$head" --workers "${WORKERS:-3}" --minutes "${MINUTES:-470}"
