#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: one process for each GPU, which jax
# finds by itself from SLURM's variables. Copy it, and edit the SBATCH lines.
#
#   sbatch launch/gpu_slurm.sh --config=configs/... --workdir=/shared/runs/q
#   bash launch/gpu_slurm.sh --dry-run ...         # prints the command
#
# Submit it from the checkout. OPD_JAX names the command; the checkout, its
# environment and the workdir must lie on a file system that all nodes share.
#
#SBATCH --job-name=opd-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1 && shift; fi

cd "${SLURM_SUBMIT_DIR:-.}"
command=(
  srun --kill-on-bad-exit=1 "${OPD_JAX:-.venv/bin/opd-jax}" train --distributed "$@"
)

if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}" && echo
else
  exec "${command[@]}"
fi
