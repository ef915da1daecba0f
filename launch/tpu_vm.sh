#!/usr/bin/env bash
# Trains on every host of a Cloud TPU VM slice; jax finds the other hosts by
# itself. Needs gcloud, logged in.
#
#   launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--setup] \
#     [--dry-run] -- --config=configs/... --workdir=/mnt/nfs/runs/q
#
#   --setup    first copies the committed files of this checkout to every host
#              and installs them there, into ~/opd_jax/.venv
#   --dry-run  prints the commands, and runs none
#
# What follows -- goes to `opd-jax train`. The workdir must be one that all
# hosts reach. Variables: REMOTE_PYTHON (python3), Python 3.11 or later.
set -euo pipefail

usage() {
  printf 'launch/tpu_vm.sh: %s\n' "$1" >&2
  sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

tpu='' where=() setup='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --setup) setup=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) usage "unknown argument $1; arguments of opd-jax follow --" ;;
  esac
  shift
done
[ -n "$tpu" ] || usage '--tpu=NAME is missing'
[[ " ${where[*]:-} " == *" --zone="* ]] || usage '--zone=ZONE is missing'
[ $# -gt 0 ] || usage 'the arguments of opd-jax train are missing'

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

on_every_host() {
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all \
    --command="$1"
}

if [ -n "$setup" ]; then
  archive=${TMPDIR:-/tmp}/opd_jax.tar.gz
  run git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:" "${where[@]}" \
    --worker=all
  on_every_host "mkdir -p opd_jax && tar -xzf opd_jax.tar.gz -C opd_jax \
&& cd opd_jax && ${REMOTE_PYTHON:-python3} -m venv .venv \
&& .venv/bin/pip install -q -e '.[tpu,gcs]'"
fi

printf -v arguments ' %q' "$@"
on_every_host "cd opd_jax && .venv/bin/opd-jax train --distributed$arguments"
