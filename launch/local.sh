#!/usr/bin/env bash
# Trains and evaluates on this machine: bash launch/local.sh [--dry-run] [--config=FILE[:VARIANT]] [--workdir=DIR] [--config.KEY=VALUE ...]
#
# Makes .venv with the pinned requirements if need be, trains LeJEPA on the digits that come with scikit-learn, and
# evaluates what was learnt. Run again after an interruption, it resumes. --config and --workdir replace the defaults
# (configs/lejepa_digits.py, workdirs/<name of the config>); anything else goes to `python -m jepa_jax train`.
# On a machine with an NVIDIA GPU: JAX_EXTRA=cuda13 bash launch/local.sh (launch/venv.sh tells the other settings).

set -euo pipefail

caller=$PWD
config=configs/lejepa_digits.py
workdir=""
dry_run=0
train_args=()

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config | --workdir)
      [ $# -gt 1 ] || { echo "error: $1 needs a value: $1=..." >&2 && exit 2; }
      if [ "$1" = --config ]; then config=$2; else workdir=$2; fi
      shift
      ;;
    *) train_args+=("$1") ;;
  esac
  shift
done

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"

# Paths are meant from where the user stands; a config may also be named from the top of the clone.
if [ "$caller" != "$root" ]; then
  if [[ $config != /* && -e $caller/${config%:*} ]]; then config=$caller/$config; fi
  case $workdir in "" | /* | *://*) ;; *) workdir=$caller/$workdir ;; esac
fi
if [ -z "$workdir" ]; then
  workdir=workdirs/$(basename "${config%:*}" .py)
  if [[ $config == *:* ]]; then workdir+=_${config##*:}; fi # FILE:VARIANT, one of several experiments in a file
fi

make_venv
install_requirements requirements.txt

# Both say where their files are. bash 3.2 (macOS) calls an empty array unset: hence the +.
run "$venv/bin/python" -m jepa_jax train --config="$config" --workdir="$workdir" ${train_args[@]+"${train_args[@]}"}
run "$venv/bin/python" -m jepa_jax eval --workdir="$workdir"
