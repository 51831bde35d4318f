# shellcheck shell=bash
# Sourced by the launch scripts: finds a Python, and keeps the virtual environment in step with the requirement files.
#
#   PYTHON=python3.12    which Python makes the environment; default: the newest of 3.13, 3.12, 3.11 that works
#   JEPA_VENV=DIR        where the environment is; default: .venv in the clone
#   JAX_EXTRA=cuda13     also install jax[cuda13] (or cuda12, tpu): requirements.txt alone is the CPU build
#   dry_run=1            (set by the caller) print the commands, change nothing

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JEPA_VENV:-$root/.venv}
python=""
python_version=""
made_new=0
dry_run=${dry_run:-0}

# Cluster modules and ROS put packages for another Python here; `pip config` may say --user, which a venv refuses.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX
export PIP_USER=0

say() { printf '== %s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Runs a command, or prints it in a dry run.
run() {
  if [ "$dry_run" = 1 ]; then
    printf 'would run:'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Prints "3.12" for a Python that runs, is new enough and can make environments; otherwise the reason, and fails.
# A pyenv shim may exist and fail, and Debian ships Python without ensurepip: so it is run, not looked up.
probe_python() {
  "$1" -c '
import sys
if sys.version_info < (3, 11):
  sys.exit("is Python %d.%d; 3.11 is the oldest that works" % sys.version_info[:2])
try:
  import ensurepip, venv
except ImportError:
  sys.exit("has no venv module (Debian, Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2])
print("%d.%d" % sys.version_info[:2])' 2>&1
}

# Sets python and python_version. A Python newer than 3.13 is taken only where there is no other.
find_python() {
  local candidates=(python3.13 python3.12 python3.11 python3 python python3.14) candidate answer newer="" why=""
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if ! command -v "$candidate" >/dev/null 2>&1; then
      why+="  $candidate: not found"$'\n'
    elif ! answer=$(probe_python "$candidate"); then
      why+="  $candidate: ${answer%%$'\n'*}"$'\n'
    elif [[ $answer == 3.1[123] ]]; then
      python=$candidate python_version=$answer
      return
    elif [ -z "$newer" ]; then
      newer=$candidate python_version=$answer
    fi
  done
  if [ -n "$newer" ]; then
    python=$newer
    printf 'warning: %s is Python %s; 3.11 to 3.13 are tested\n' "$newer" "$python_version" >&2
    return
  fi
  printf 'tried:\n%s' "$why" >&2
  die "no Python from 3.11 to 3.13 works here. Install one (python.org, your package manager, conda, pyenv)," \
    "or name it: PYTHON=/path/to/python bash launch/..."
}

# Sets python_version from the environment that is there; fails if there is none, it no longer runs, or an install was
# cut short in it: pip takes a package that it unpacked by half for an installed one.
venv_works() {
  [ ! -e "$venv/unfinished" ] || return 1
  python_version=$("$venv/bin/python" -c '
import sys, pip
assert sys.version_info >= (3, 11)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
}

# Keeps an environment that works, unless PYTHON asks for another version. Makes it otherwise.
make_venv() {
  local have=""
  if venv_works; then have=$python_version; fi
  if [ -n "$have" ] && [ -z "${PYTHON:-}" ]; then
    [ "$dry_run" = 0 ] || say "python: $have, in $venv, which is there"
    return
  fi
  find_python
  if [ "$have" = "$python_version" ]; then
    [ "$dry_run" = 0 ] || say "python: $have, in $venv, which is there"
    return
  fi
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    die "$venv is there and is no virtual environment. Move it away, or set JEPA_VENV to another place."
  fi
  say "python: $(command -v "$python") ($python_version)"
  say "making $venv (with what goes into it: a few minutes, about 1.2 GB)"
  run "$python" -m venv --clear "$venv"
  made_new=1
}

# What the environment holds once file $1 is installed: compared with the stamp, so that a second run installs nothing.
stamp_text() {
  printf 'python %s, jax extra: %s\n' "$python_version" "${JAX_EXTRA:-none}"
  cat "$root/$1"
}

# Reads pip's output; prints every tenth package, enough to see that it moves.
show_progress() {
  local line num_fetched=0
  while IFS= read -r line; do
    case $line in
      "Collecting "* | "Processing "*)
        num_fetched=$((num_fetched + 1))
        if ((num_fetched % 10 == 0)); then echo "   $num_fetched packages fetched"; fi
        ;;
      "Installing collected packages"*) echo "   unpacking" ;;
    esac
  done
}

# Installs requirement file $1 (path in the clone) where its stamp is missing or differs.
install_requirements() {
  local file=$1 stamp="$venv/installed/$1" log="$venv/install.log"
  shift
  if [ "$made_new" = 0 ] && [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(stamp_text "$file")" ]; then
    [ "$dry_run" = 0 ] || say "$file: installed already"
    return
  fi
  local pip=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off -r "$root/$file" "$@")
  if [ -n "${JAX_EXTRA:-}" ]; then pip+=("jax[$JAX_EXTRA]"); fi
  if [ "$dry_run" = 1 ]; then
    run "${pip[@]}"
    return
  fi
  touch "$venv/unfinished"
  say "installing $file (all output: $log)"
  if ! PYTHONUNBUFFERED=1 "${pip[@]}" 2>&1 | tee "$log" | show_progress; then
    tail -n 15 "$log" >&2
    die "pip could not install $file: its last lines are above. If they speak of connections or time-outs, check the" \
      "network (behind a proxy: HTTPS_PROXY) and run the same command again; pip keeps what it fetched."
  fi
  mkdir -p "$(dirname "$stamp")"
  stamp_text "$file" >"$stamp"
  rm "$venv/unfinished"
}
