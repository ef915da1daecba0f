#!/usr/bin/env bash
# Trains on this machine's CPU, cut into eight virtual devices: the sharding of
# a pod, without one.
#
#   launch/cpu8.sh [--dry-run] --config=configs/quickstart.py --workdir=runs/q
#
# DEVICES=4 gives another number; OPD_JAX names the command.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1 && shift; fi

flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${DEVICES:-8}"
command=(
  env JAX_PLATFORMS=cpu XLA_FLAGS="$flags" "${OPD_JAX:-opd-jax}" train "$@"
)

if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}" && echo
else
  exec "${command[@]}"
fi
