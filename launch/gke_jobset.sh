#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster as a JobSet: a pod for each host of each
# slice, all started again if one fails. Needs kubectl with the cluster's
# credentials, and JobSet installed there.
#
#   launch/gke_jobset.sh --name=NAME --image=IMAGE \
#     --accelerator=tpu-v6e-slice --topology=4x4 --hosts=4 --chips=4 \
#     [--slices=1] [--restarts=20] [--service-account=ACCOUNT] \
#     [--namespace=default] [--dry-run] -- --config=configs/... \
#     --workdir=gs://...
#   launch/gke_jobset.sh --name=NAME [--namespace=default] --delete
#
#   --hosts     of a slice; --chips: of a host
#   --restarts  of all pods before the job counts as failed
#   --dry-run   prints the manifest, and applies nothing
#
# What follows -- goes to `opd-jax train`. GKE tells the pods of each other.
set -euo pipefail

usage() {
  printf 'launch/gke_jobset.sh: %s\n' "$1" >&2
  sed -n '2,/^set /{/^#/p}' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
}

name='' image='' accelerator='' topology='' hosts='' chips='' slices=1
restarts=20 account=default namespace=default delete='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
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

[ -n "$name" ] || usage '--name=NAME is missing'
if [ -n "$delete" ]; then
  run kubectl delete jobset "$name" "--namespace=$namespace"
  exit
fi
for key in image accelerator topology hosts chips; do
  [ -n "${!key}" ] || usage "--$key is missing"
done
for key in hosts chips slices restarts; do
  [[ ${!key} =~ ^[0-9]+$ ]] || usage "--$key=${!key} is no number"
done
for key in name image accelerator topology account namespace; do
  [[ ${!key} =~ ^[A-Za-z0-9][A-Za-z0-9./:@_-]*$ ]] \
    || usage "--$key=${!key} has characters that it cannot have"
done
[ $# -gt 0 ] || usage 'the arguments of opd-jax train are missing'
[[ "$*" != *$'\n'* ]] || usage 'an argument has several lines'

# A string of YAML in single quotes; only these are doubled in it.
arguments() {
  local argument
  for argument in train --distributed "$@"; do
    printf "                    - '%s'\n" "${argument//\'/\'\'}"
  done
}

manifest() {
  cat <<YAML
---
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              serviceAccountName: $account
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: opd-jax
                  image: $image
                  args:
$(arguments "$@")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  securityContext:
                    privileged: true
                  resources:
                    requests:
                      google.com/tpu: $chips
                    limits:
                      google.com/tpu: $chips
YAML
}

if [ -n "$dry_run" ]; then
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
fi
