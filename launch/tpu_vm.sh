#!/usr/bin/env bash
# Trains on every host of a Cloud TPU VM slice; jax finds the other hosts by
# itself. Needs gcloud, logged in.
#
#   launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--setup] \
#     [--dry-run] -- --config=configs/... --workdir=gs://...
#
#   --setup    first copies the committed files of this checkout to every host
#              and installs them there, into ~/opd_jax/.venv, with the versions
#              of requirements/lock-py312.txt and a Python 3.12 that uv gets
#   --dry-run  prints the commands, and runs none
#
# What follows -- goes to `opd-jax train`. The workdir must be one that all
# hosts reach. Ctrl-C may leave the processes of the hosts running; this ends
# them, after they have saved:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command="pkill -TERM -f '[o]pd-jax train'"
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
  root=$(dirname "$0")/..
  folder=${TMPDIR:-/tmp}
  if [ -z "$dry_run" ]; then
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
  fi
  run git -C "$root" archive --format=tar.gz -o "$folder/opd_jax.tar.gz" HEAD
  run gcloud compute tpus tpu-vm scp "$folder/opd_jax.tar.gz" "$tpu:" \
    "${where[@]}" --worker=all
  # The Python of an image may be older than 3.11, and have no venv.
  uv=$(sed -n 's/^\(uv==[0-9.]*\).*/\1/p' "$root/requirements/lock-py312.txt")
  on_every_host "mkdir -p opd_jax && tar -xzf opd_jax.tar.gz -C opd_jax \
&& cd opd_jax \
&& PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user $uv \
&& python3 -m uv venv -q --allow-existing --python=3.12 .venv \
&& python3 -m uv pip install -q -c requirements/lock-py312.txt \
-e '.[tpu,gcs]'"
fi

printf -v arguments ' %q' "$@"
on_every_host "cd opd_jax && .venv/bin/opd-jax train --distributed$arguments"
