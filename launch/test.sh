#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [--dry-run] [arguments of pytest ...], for example: -k sigreg, -m "not slow", -n 4
#
# Makes .venv with the pinned requirements and the test tools if need be. The tests need no accelerator and no data set:
# they run on eight fake CPU devices. Paths are from the top of the clone.

set -euo pipefail

dry_run=0
pytest_args=()
for arg in "$@"; do
  case $arg in
    --dry-run) dry_run=1 ;;
    *) pytest_args+=("$arg") ;;
  esac
done

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"

make_venv
install_requirements requirements.txt
install_requirements tests/requirements.txt

# Two workers, whole files each: compilation is what takes the time, and fixtures share compiled steps within a file.
run "$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 ${pytest_args[@]+"${pytest_args[@]}"}
