#!/bin/bash
# A batch file on many machines, an engine on each: every task of the array takes its share of the lines.
#   sbatch docs/deploy/slurm_array.sh requests.jsonl results [further flags of scripts/batch.py]
# Run it from the repository, with .venv and results on a file system that all hosts see. A task that is killed or requeued
# goes on where its own results end; cat results/*.jsonl when all have ended.
#SBATCH --job-name=jaxserve-batch
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --requeue
#SBATCH --signal=INT@60
set -euo pipefail

requests=$1 results=$2
shift 2
mkdir -p "$results"
shard=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
exec srun .venv/bin/python scripts/batch.py "$requests" "$results/$shard.jsonl" \
    --shard "$shard/$SLURM_ARRAY_TASK_COUNT" "$@"
