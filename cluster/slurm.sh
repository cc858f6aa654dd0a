#!/bin/bash
# A study on the GPUs of several nodes: sbatch cluster/slurm.sh gemma-3-270m
# The folder of the project, with its .venv (pip install -e '.[cluster,gemma-3-270m]'), lies on a disk that all nodes share.
#SBATCH --job-name=gsm8k_sft
#SBATCH --nodes=2
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
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
# MINUTES ends before Slurm's limit, so that trainings leave checkpoints; the same command goes on from them.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_NNODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --include-dashboard false -- \
  python -m gsm8k_sft.experiments.runner "$study" --ray auto --workers "${WORKERS:-3}" --minutes "${MINUTES:-470}"
