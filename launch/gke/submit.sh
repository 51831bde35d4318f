#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet:
#   bash launch/gke/submit.sh --name=NAME --type=v6e --topology=4x4 --image=IMAGE --bucket=BUCKET \
#     --config=FILE[:VARIANT] --workdir=FOLDER \
#     [--config.KEY=VALUE ...] [--init-from=DIR --init-what=NAMES] [--profile=A:B]
#
# Fills in launch/gke/jobset.yaml and hands it to kubectl. Exit code 75 (saved after SIGTERM) and lost nodes resume
# without counting; 2 and 3 end the job; anything else restarts all pods, at most --max-restarts times.
# docs/tpu.md says how to make the cluster and the node pool. IMAGE: bash launch/docker.sh --push tpu IMAGE.
#
#   --type=TYPE            v4, v5e, v5p, v6e, tpu7x; or the node label cloud.google.com/gke-tpu-accelerator itself
#   --topology=AxB[xC]     that of the node pool
#   --chips-per-host=4     that of the machine type (8 for ct5lp-hightpu-8t and ct6e-standard-8t)
#   --bucket=BUCKET        mounted at /mnt/gcs
#   --workdir=FOLDER       a folder in the bucket
#   --namespace=default --service-account=default --max-restarts=50
#   --dry-run              print the manifest and the command; needs no kubectl

set -euo pipefail

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}
dry_run=0
name="" type="" topology="" image="" bucket="" config="" workdir=""
namespace=default service_account=default chips_per_host=4 max_restarts=50
train_args=()
for arg in "$@"; do
  case $arg in
    --dry-run) dry_run=1 ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --name=*) name=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --topology=*) topology=${arg#*=} ;;
    --image=*) image=${arg#*=} ;;
    --bucket=*) bucket=${arg#*=} bucket=${bucket#gs://} bucket=${bucket%/} ;;
    --config=*) config=${arg#*=} ;;
    --workdir=*) workdir=${arg#*=} ;;
    --namespace=*) namespace=${arg#*=} ;;
    --service-account=*) service_account=${arg#*=} ;;
    --chips-per-host=*) chips_per_host=${arg#*=} ;;
    --max-restarts=*) max_restarts=${arg#*=} ;;
    --config.*=* | --accept-config-change | --init-from=* | --init-what=* | --profile | --profile=*) train_args+=("$arg") ;;
    *) refuse "unknown argument $arg (--help shows all; values take the form --name=value)" ;;
  esac
done

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/../venv.sh"
cd "$root"

check_arguments() {
  local given missing=()
  for given in name type topology image bucket config workdir; do
    [ -n "${!given}" ] || missing+=("--$given=")
  done
  [ ${#missing[@]} = 0 ] || refuse "missing: ${missing[*]} (--help shows what they mean)"
  # JobSet appends "-train-0-<index>-<5 letters>" and a pod's host name has at most 63 letters.
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || refuse "--name=$name: lower-case letters, digits and -, at most 40, starting with a letter"
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || refuse "--topology=$topology: like 4x4 (v5e, v6e) or 2x2x2 (v4, v5p, tpu7x)"
  [[ $chips_per_host =~ ^[1-9][0-9]*$ ]] || refuse "--chips-per-host=$chips_per_host: a number"
  [[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts=$max_restarts: a number"
  case $config in /*) refuse "--config=$config: name it from the top of the clone: that is what the image holds" ;; esac
  case $workdir in *://* | /*) refuse "--workdir=$workdir: a folder in the bucket, such as runs/first" ;; esac
  if [ "$dry_run" = 0 ] && ! command -v kubectl >/dev/null 2>&1; then
    die "kubectl is not here: gcloud components install kubectl, then: gcloud container clusters get-credentials CLUSTER (or --dry-run)"
  fi
}

# The values of the node label. https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
choose_accelerator() {
  case $type in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    tpu*) accelerator=$type ;;
    *) refuse "--type=$type: v4, v5e, v5p, v6e, tpu7x, or the label of the nodes: kubectl get nodes -L cloud.google.com/gke-tpu-accelerator" ;;
  esac
}

# Sets num_hosts: the chips of the topology over those of a host.
count_hosts() {
  local chips=$((${topology//x/ * }))
  if ((chips < chips_per_host || chips % chips_per_host)); then
    refuse "--topology=$topology has $chips chips, which does not divide into hosts of $chips_per_host: --chips-per-host="
  fi
  num_hosts=$((chips / chips_per_host))
}

# Prints the arguments as a YAML list of double-quoted strings.
yaml_args() {
  local arg
  for arg in "$@"; do
    arg=${arg//\\/\\\\}
    printf '                    - "%s"\n' "${arg//\"/\\\"}"
  done
}

# Prints the manifest.
render() {
  local text key value args
  text=$(cat launch/gke/jobset.yaml)
  args=(train --distributed "--config=$config" "--workdir=/mnt/gcs/$workdir" ${train_args[@]+"${train_args[@]}"})
  while IFS='=' read -r key value; do
    text=${text//"\${$key}"/"$value"}
  done <<END
NAME=$name
NAMESPACE=$namespace
SERVICE_ACCOUNT=$service_account
MAX_RESTARTS=$max_restarts
NUM_HOSTS=$num_hosts
CHIPS_PER_HOST=$chips_per_host
ACCELERATOR=$accelerator
TOPOLOGY=$topology
IMAGE=$image
BUCKET=$bucket
END
  printf '%s\n' "${text//"\${ARGS}"/"$(yaml_args "${args[@]}")"}"
}

check_arguments
choose_accelerator
count_hosts
if [ "$dry_run" = 1 ]; then
  render
  printf -- '---\n# would run: kubectl apply -f - (with the manifest above)\n'
else
  render | kubectl apply -f -
  say "follow: kubectl logs --namespace=$namespace --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
  say "stop and delete: kubectl delete jobset --namespace=$namespace $name"
fi
