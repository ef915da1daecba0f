#!/usr/bin/env bash
# install_torch.sh PIP [TORCH [OTHER ...]]
# Installs torch for the parity tests, if the index offers a CPU build of it,
# then other requirements of theirs without what these depend on. Otherwise it
# says why not and succeeds: the parity tests then skip.
set -euo pipefail

pip=$1
requirement=${2:-}
others=("${@:3}")

skip() {
  printf '\n*** torch is NOT installed: %s.\n' "$1"
  printf '*** The parity tests will skip. Install a CPU build with %s\n' "$pip"
  printf '*** to run them.\n\n'
  exit 0
}

[ -n "$requirement" ] || skip 'TORCH is empty'
# The build for GPUs depends on CUDA packages; the CPU build does not.
plan=$("$pip" install --quiet --dry-run --report - "$requirement" 2>/dev/null) \
  || skip "pip finds no $requirement for this Python"
if grep -qiE '"name": "(nvidia|cuda|triton)' <<<"$plan"; then
  skip "pip would take the build for GPUs, gigabytes of it"
fi
"$pip" install --quiet "$requirement" \
  || skip "pip could not install $requirement"
[ "${#others[@]}" -eq 0 ] \
  || "$pip" install --quiet --no-deps "${others[@]}" \
  || printf '\n*** NOT installed: %s. Tests of theirs will skip.\n\n' \
    "${others[*]}"
