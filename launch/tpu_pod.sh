#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from your own machine:
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v6e-16 --bucket=BUCKET --config=FILE[:VARIANT] --workdir=DIR \
#     [--config.KEY=VALUE ...] [--init-from=DIR --init-what=NAMES] [--profile=A:B]
#
# Creates the slice if it is not there, copies the code to all workers, starts the run on all of them and prints what
# worker 0 prints. After a preemption it makes the slice again and resumes. The run does not hang on your connection:
# Ctrl-C only stops following; the same command follows again. YOU PAY UNTIL YOU DELETE: --delete.
#
#   --type=TYPE        v4-32, v5litepod-16, v5p-16, v6e-16, ... cloud.google.com/tpu/docs/regions-zones says what is where
#   --workdir=DIR      a folder in the bucket, or an absolute path that all workers share
#   --bucket=BUCKET    Cloud Storage bucket in the same region, mounted at /mnt/gcs on all workers
#   --queued           ask through a queued resource, which waits until there is a slice
#   --spot             cheaper, and can be taken away at any time
#   --runtime=VERSION  image of the workers; default: by type, from cloud.google.com/tpu/docs/runtimes
#   --project=PROJECT  default: that of gcloud
#   --delete-at-end    delete the slice when the run has ended, well or badly
#   --create-flag=FLAG handed to the create command as it is, such as --create-flag=--reserved; may be repeated
#   --dry-run          print every command and change nothing; needs no gcloud
#   --stop, --delete   instead of training: save and stop the run; delete the slice (the bucket stays)

set -euo pipefail

dry_run=0 action=run queued=0 delete_at_end=0
name="" zone="" type="" runtime="" bucket="" config="" workdir=""
where=()
create_flags=()
train_args=()
for arg in "$@"; do
  case $arg in
    --dry-run) dry_run=1 ;;
    --stop | --delete) action=${arg#--} ;;
    --queued) queued=1 ;;
    --spot) create_flags+=(--spot) ;;
    --delete-at-end) delete_at_end=1 ;;
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --runtime=*) runtime=${arg#*=} ;;
    --bucket=*) bucket=${arg#*=} bucket=${bucket#gs://} bucket=${bucket%/} ;;
    --project=*) where+=("$arg") ;;
    --create-flag=*) create_flags+=("${arg#*=}") ;;
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --config.*=* | --accept-config-change | --init-from=* | --init-what=* | --profile | --profile=*) train_args+=("$arg") ;;
    *)
      echo "error: unknown argument $arg (--help shows all; values take the form --name=value)" >&2
      exit 2
      ;;
  esac
done

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# shellcheck source=launch/supervise.sh
source "$root/launch/supervise.sh"
cd "$root"
poll_s=${JEPA_POLL_S:-30}

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

check_arguments() {
  local missing=()
  [ -n "$name" ] || missing+=(--name=)
  [ -n "$zone" ] || missing+=(--zone=)
  if [ "$action" = run ]; then
    [ -n "$type" ] || missing+=(--type=)
    [ -n "$config" ] || missing+=(--config=)
    [ -n "$workdir" ] || missing+=(--workdir=)
  fi
  [ ${#missing[@]} = 0 ] || refuse "missing: ${missing[*]} (--help shows what they mean)"
  if [ "$dry_run" = 0 ] && ! command -v gcloud >/dev/null 2>&1; then
    die "gcloud is not here: cloud.google.com/sdk/docs/install, then: gcloud auth login (or --dry-run)"
  fi
  [ "$action" = run ] || return 0
  case $config in
    /*) refuse "--config=$config: name it from the top of the clone; what is copied to the workers is configs/, jepa_jax/ and launch/" ;;
  esac
  [ -e "${config%:*}" ] || refuse "--config=$config: no such file in $root"
  case $workdir in
    *://*) refuse "--workdir=$workdir: the program writes to a file system. Give --bucket=BUCKET --workdir=FOLDER: the bucket is mounted" ;;
    /*) ;;
    *)
      [ -n "$bucket" ] || refuse "--workdir=$workdir is a folder of one worker's own disk. Give --bucket=BUCKET, or the absolute path of a file system that all workers share"
      workdir=/mnt/gcs/$workdir
      ;;
  esac
  [ -n "$runtime" ] || choose_runtime
}

# https://cloud.google.com/tpu/docs/runtimes
choose_runtime() {
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) runtime=tpu-ubuntu2204-base ;;
    tpu7x* | v7*) refuse "--type=$type: the Cloud TPU API has no TPU7x; use GKE: launch/gke/submit.sh" ;;
    *) refuse "--type=$type: unknown. For a new type also give --runtime=, from cloud.google.com/tpu/docs/runtimes" ;;
  esac
}

tpus() { run gcloud compute tpus "$@" "--zone=$zone" ${where[@]+"${where[@]}"}; }

# Prints one value about the slice or the queued resource ($1: tpu-vm or queued-resources, $2: a format), or MISSING.
ask() {
  local answer
  if answer=$(tpus "$1" describe "$name" "--format=value($2)" 2>"$scratch/ask"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not[_ ]found' "$scratch/ask"; then
    echo MISSING
  else
    cat "$scratch/ask" >&2
    return 1
  fi
}

# The scope leaves it to IAM what the workers may do, such as write to the bucket.
create() {
  local flags=(--scopes=https://www.googleapis.com/auth/cloud-platform ${create_flags[@]+"${create_flags[@]}"})
  if [ "$queued" = 1 ]; then
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" "${flags[@]}"
  else
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$runtime" "${flags[@]}"
  fi
}

delete() {
  if [ "$queued" = 1 ]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# Returns once the slice is READY: creates it, waits for it, replaces one that was taken away.
ensure_slice() {
  local state queue=MISSING said=""
  while :; do
    state=$(ask tpu-vm state) || return 1
    if [ "$state" = READY ]; then return; fi
    if [ "$queued" = 1 ]; then queue=$(ask queued-resources state.state) || return 1; fi
    if [ "$said" != "$state $queue" ]; then
      say "slice $name: $state$([ "$queued" = 0 ] || echo ", queued resource: $queue")"
      said="$state $queue"
    fi
    case $state:$queue in
      MISSING:MISSING) create || return 1 ;;
      *:FAILED)
        echo "error: the request failed; why: gcloud compute tpus queued-resources describe $name --zone=$zone. Then: --delete, and again" >&2
        return 1
        ;;
      *:SUSPENDED | MISSING:ACTIVE) delete || return 1 ;;
      PREEMPTED:MISSING | TERMINATED:MISSING | STOPPED:MISSING | HIDDEN:MISSING) delete || return 1 ;;
      *) sleep "$poll_s" ;; # being made, waiting in the queue, being deleted
    esac
  done
}

# Copies the code and starts or follows the run on all workers; returns the program's exit code, or gcloud's.
run_on_workers() {
  local worker_args worker=jepa_jax/launch/tpu_worker.sh
  worker_args=$(printf ' %q' "--bucket=$bucket" "--config=$config" "--workdir=$workdir" ${train_args[@]+"${train_args[@]}"})
  # COPYFILE_DISABLE: no ._ files from macOS.
  COPYFILE_DISABLE=1 run tar -czf "$scratch/jepa_jax.tgz" --exclude=__pycache__ configs jepa_jax launch requirements.txt || return
  tpus tpu-vm scp "$scratch/jepa_jax.tgz" "$name:jepa_jax.tgz" --worker=all || return
  # The code of a run that is alive stays as it is.
  tpus tpu-vm ssh "$name" --worker=all --command="bash $worker --alive 2>/dev/null || {
    mkdir -p jepa_jax && (cd jepa_jax && rm -rf configs jepa_jax launch) && tar -xzf jepa_jax.tgz -C jepa_jax; } && bash $worker$worker_args"
}

check_arguments
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case $action in
  stop)
    tpus tpu-vm ssh "$name" --worker=all --command="bash jepa_jax/launch/tpu_worker.sh --stop"
    exit
    ;;
  delete)
    delete
    exit
    ;;
esac

if [ "$dry_run" = 1 ]; then
  create
  run_on_workers
  say "and on every worker, in ~/jepa_jax (here with the paths of this clone):"
  bash launch/tpu_worker.sh --dry-run "--bucket=$bucket" "--config=$config" "--workdir=$workdir" ${train_args[@]+"${train_args[@]}"}
  if [ "$delete_at_end" = 1 ]; then delete; fi
  exit
fi

trap 'say "the run goes on without you. Follow it: the same command; stop it: --stop; DELETE THE SLICE: --delete"; exit 130' INT
while :; do
  code=0 started_s=$SECONDS
  if ensure_slice; then
    run_on_workers || code=$?
  elif [ "$restarts" = 0 ]; then
    die "no slice: gcloud's message is above. Out of capacity: try --queued, another zone, or --spot. Quota: docs/tpu.md"
  else
    code=75 # taken away, and none to be had yet
  fi
  # Whatever the code (the connection breaks, gcloud refuses), a slice that is no longer there has been preempted.
  case $code in 0 | 2 | 3 | 75) ;; *) if [ "$(ask tpu-vm state || echo READY)" != READY ]; then code=75; fi ;; esac
  should_run_again "$code" $((SECONDS - started_s)) || break
done
if [ "$delete_at_end" = 1 ]; then
  delete
else
  say "slice $name is still there and costs money: bash launch/tpu_pod.sh --name=$name --zone=$zone $([ "$queued" = 0 ] || echo "--queued ")--delete"
fi
exit "$code"
