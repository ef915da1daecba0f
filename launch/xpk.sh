#!/usr/bin/env bash
# Trains on TPU slices of a cluster that XPK made. Needs xpk, and gcloud logged
# in.
#
#   launch/xpk.sh --cluster=CLUSTER --workload=NAME --image=IMAGE \
#     --tpu-type=v6e-16 [--num-slices=1] [--max-restarts=20] [--zone=ZONE] \
#     [--project=PROJECT] [--dry-run] -- --config=configs/... \
#     --workdir=gs://...
#   launch/xpk.sh --cluster=CLUSTER --workload=NAME --delete [--zone=ZONE] \
#     [--project=PROJECT]
#
# What follows -- goes to `opd-jax train`. --dry-run prints the command.
set -euo pipefail

usage() {
  printf 'launch/xpk.sh: %s\n' "$1" >&2
  sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

which=() where=() pool=() restarts=--max-restarts=20 delete='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=* | --workload=*) which+=("$1") ;;
    --zone=* | --project=*) where+=("$1") ;;
    --image=*) pool+=("--docker-image=${1#*=}") ;;
    --tpu-type=* | --num-slices=*) pool+=("$1") ;;
    --max-restarts=*) restarts=$1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) usage "unknown argument $1; arguments of opd-jax follow --" ;;
  esac
  shift
done

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

for key in cluster workload; do
  [[ " ${which[*]:-} " == *" --$key="* ]] || usage "--$key is missing"
done
if [ -n "$delete" ]; then
  run xpk workload delete "${which[@]}" "${where[@]}"
  exit
fi
[[ " ${pool[*]:-} " == *" --docker-image="* ]] || usage '--image is missing'
[[ " ${pool[*]} " == *" --tpu-type="* ]] || usage '--tpu-type is missing'
[ $# -gt 0 ] || usage 'the arguments of opd-jax train are missing'

printf -v arguments ' %q' "$@"
run xpk workload create "${which[@]}" "${where[@]}" "${pool[@]}" "$restarts" \
  --command="opd-jax train --distributed$arguments"
