#!/usr/bin/env bash
# Waits in the queue for a Cloud TPU slice, trains on it, and gives it back. If
# the slice is taken away, queues again; the run resumes. Needs gcloud, logged
# in.
#
#   launch/tpu_queued.sh --name=NAME --zone=ZONE --type=v6e-8 \
#     --runtime=v2-alpha-tpuv6e [--project=PROJECT] [--spot] [--keep] \
#     [--attempts=20] [--dry-run] -- --config=configs/... --workdir=gs://...
#
#   --spot      cheaper, and may be taken away
#   --keep      leaves the slice in the end, instead of deleting it
#   --attempts  starts of the run before it gives up
#   --dry-run   prints the commands of one attempt, and runs none
#
# What follows -- goes to `opd-jax train`. The workdir must be one that outlives
# the slice, such as a bucket. A start is the last that fails sooner than
# QUICK_SECONDS (600) while the slice stays, or with status 2, bad input.
# Variables: this one, and POLL_SECONDS (60) between looks at the queue; LOOKS
# (10) in a row that fail are the last.
set -euo pipefail

usage() {
  printf 'launch/tpu_queued.sh: %s\n' "$1" >&2
  sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

name='' where=() slice=() spot=() keep='' attempts=20 dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=* | --project=*) where+=("$1") ;;
    --type=*) slice+=("--accelerator-type=${1#*=}") ;;
    --runtime=*) slice+=("--runtime-version=${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --keep) keep=1 ;;
    --attempts=*) attempts=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) usage "unknown argument $1; arguments of opd-jax follow --" ;;
  esac
  shift
done
[ -n "$name" ] || usage '--name=NAME is missing'
[[ " ${where[*]:-} " == *" --zone="* ]] || usage '--zone=ZONE is missing'
[[ " ${slice[*]:-} " == *" --accelerator-type="* ]] \
  || usage '--type=TYPE is missing, such as v6e-8'
[[ " ${slice[*]} " == *" --runtime-version="* ]] \
  || usage '--runtime=VERSION is missing, such as v2-alpha-tpuv6e'
[[ $attempts =~ ^[1-9][0-9]*$ ]] || usage "--attempts=$attempts is no number"
[ $# -gt 0 ] || usage 'the arguments of opd-jax train are missing'

queue=(gcloud compute tpus queued-resources)
create=(
  "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" "${slice[@]}"
  "${spot[@]}"
)
describe=(
  "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
)
delete=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
train=(
  "$(dirname "$0")/tpu_vm.sh" "--tpu=$name" "${where[@]}" --setup
)

if [ -n "$dry_run" ]; then
  for command in create describe; do
    declare -n words=$command
    printf '%q ' "${words[@]}" && echo
  done
  "${train[@]}" --dry-run -- "$@"
  [ -n "$keep" ] || { printf '%q ' "${delete[@]}" && echo; }
  exit
fi

state() {
  local found
  if "${describe[@]}" 2>/dev/null; then return; fi
  found=$("${describe[@]}" 2>&1 >/dev/null) || true
  if [[ $found == *NOT_FOUND* ]]; then echo ABSENT; else echo "UNKNOWN $found"; fi
}

# shellcheck disable=SC2329  # The trap calls it.
finish() {
  status=$?
  trap - EXIT
  if [ -n "$keep" ]; then
    echo "$name is left; it costs until: ${delete[*]}" >&2
  elif [ "$(state)" != ABSENT ]; then
    "${delete[@]}" || echo "not deleted, and may cost: ${delete[*]}" >&2
  fi
  exit "$status"
}
trap 'finish' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((attempt = 1; attempt <= attempts; attempt++)); do
  unknown=0
  while found=$(state) && [ "$found" != ACTIVE ]; do
    case $found in
      UNKNOWN*) unknown=$((unknown + 1)) ;;
      *) unknown=0 ;;
    esac
    if ((unknown >= ${LOOKS:-10})); then
      echo "launch/tpu_queued.sh: $unknown looks at the queue failed: $found" >&2
      exit 1
    fi
    case $found in
      ABSENT) "${create[@]}" ;;
      FAILED | SUSPENDED) "${delete[@]}" ;;
      *) echo "$name: $found" >&2 && sleep "${POLL_SECONDS:-60}" ;;
    esac
  done
  echo "attempt $attempt of $attempts" >&2
  began=$SECONDS
  ended=0
  "${train[@]}" -- "$@" || ended=$?
  lasted=$((SECONDS - began))
  if ((ended == 0)); then exit 0; fi
  if ((ended == 2)); then
    echo "launch/tpu_queued.sh: bad input; not started again" >&2
    exit 2
  fi
  # A slice that is taken away is called ACTIVE a little longer.
  sleep "${POLL_SECONDS:-60}"
  if [ "$(state)" = ACTIVE ] && ((lasted < ${QUICK_SECONDS:-600})); then
    echo "launch/tpu_queued.sh: failed after $lasted s on a slice that is" \
      "still there; not started again" >&2
    exit 1
  fi
done
echo "launch/tpu_queued.sh: gave up after $attempts attempts" >&2
exit 1
