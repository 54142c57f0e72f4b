#!/bin/bash
# Falcon-180B on two hosts of four GPUs: tensor parallel within a host, one pipeline stage on each.
#   sbatch docs/deploy/slurm.sh [further flags of scripts/serve.py]
# Run it from the repository, with .venv on a file system that all hosts see.
#SBATCH --job-name=jaxserve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --signal=TERM@60
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)

# SLURM_PROCID tells each process its place. One that ends takes the others with it, and the group starts again as a
# whole, unless it was asked to end (exit code 0) or cannot work as configured (2).
while true; do
    code=0
    srun --kill-on-bad-exit=1 .venv/bin/python scripts/serve.py --hosts "$hosts" --host 0.0.0.0 --port 50051 \
        --model tiiuae/falcon-180B --tensor-parallel 4 --pipeline-parallel 2 --token-budget 512 --max-num-seqs 128 \
        --max-model-len 4096 "$@" || code=$?
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
        exit "$code"
    fi
    echo "jaxserve ended with exit code $code; starting it again"
done
