#!/usr/bin/env bash
# Trains on all GPUs of this machine: bash launch/gpu_node.sh [--dry-run] CONFIG[:VARIANT] WORKDIR [--config.KEY=VALUE ...]
#
# Makes .venv with JAX for CUDA (12 or 13, by the driver; JAX_EXTRA chooses) if need be. One process drives all GPUs.
# SIGTERM and Ctrl-C make it save and end with code 75; run again, it resumes. A crash is resumed up to three times in
# a row (launch/supervise.sh has the settings). CUDA_VISIBLE_DEVICES=0,1 takes only some of the GPUs. Paths are from the
# top of the clone.

set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit "$1"
}
dry_run=0
positional=()
train_args=()
for arg in "$@"; do
  case $arg in
    --dry-run) dry_run=1 ;;
    -h | --help) usage 0 ;;
    -*) train_args+=("$arg") ;;
    *) positional+=("$arg") ;;
  esac
done
if [ ${#positional[@]} != 2 ]; then
  printf 'error: needs CONFIG and WORKDIR, got: %s\n' "${positional[*]-nothing}" >&2
  usage 2 >&2
fi

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
# shellcheck source=launch/supervise.sh
source "$root/launch/supervise.sh"
cd "$root"

JAX_EXTRA=${JAX_EXTRA:-$(cuda_extra)}
make_venv
install_requirements requirements.txt
set_platform_env cuda

train=("$venv/bin/python" -m jepa_jax train "--config=${positional[0]}" "--workdir=${positional[1]}" ${train_args[@]+"${train_args[@]}"})
if [ "$dry_run" = 1 ]; then
  run "${train[@]}"
  exit
fi
while :; do
  started_s=$SECONDS
  supervise "${train[@]}"
  if [ "$asked_to_stop" = 1 ] || ! should_run_again "$exit_code" $((SECONDS - started_s)); then exit "$exit_code"; fi
done
