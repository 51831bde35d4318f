#!/usr/bin/env bash
# The numbers that docs/reproducing.md wants from one GPU: bash launch/measure_gpu.sh [--dry-run] OUT [--config.data.KEY=VALUE ...]
#
# Checks, then times, then trains, so that a short lease still gives the first ones: that there is a GPU, our steps
# beside PyTorch's, eager and compiled (where torch is installed), SIGReg, the nuclear norm, images/s with the share of
# the measured matrix peak (I-JEPA also by the share of patches kept), the digits config unchanged with every step's
# loss (to lay beside the same run on a CPU), then CIFAR-10: IWM with two seeds (IWM_STEPS, default 40000), LeJEPA and
# MMCR with ResNet-18, and their evaluation. Everything is written under OUT. Needs JAX for CUDA (JAX_EXTRA=cuda13).
# EPOCHS=300 is the published setting of LeJEPA, 500 of MMCR.

set -euo pipefail

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
if [ $# -lt 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
out=$1
shift

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"
make_venv
install_requirements requirements.txt
python=$venv/bin/python

if [ "$dry_run" = 0 ]; then
  mkdir -p "$out"
  "$python" -c "import jax; assert jax.default_backend() == 'gpu', f'no GPU here: {jax.devices()}'"
fi
# Prints a measurement and keeps it under OUT.
measure() {
  local name=$1
  shift
  if [ "$dry_run" = 1 ]; then run "$python" -m jepa_jax bench "$@"; else "$python" -m jepa_jax bench "$@" | tee "$out/$name.json"; fi
}
if "$python" -c "import torch" 2>/dev/null || [ "$dry_run" = 1 ]; then
  for method in ijepa lejepa lejepa_resnet18 mmcr; do
    measure "against_$method" against --methods="$method" --batch-size=128 --steps=10 --compile
  done
fi
measure sigreg_8192x512 sigreg --num-samples=8192 --num-slices=512
measure sigreg_1024x1024 sigreg
measure nuclear_2048x512 nuclear --sizes=2048x512
for config in lejepa_cifar10_resnet18 lejepa_imagenette_vits mmcr_cifar10_resnet18 ijepa_imagenette_vits iwm_cifar10; do
  measure "step_$config" step --config="configs/$config.py"
done
for size in vitb vith; do # a pod's configs, with a batch that one GPU holds
  measure "step_ijepa_imagenet_$size" step --config="configs/ijepa_imagenet.py:$size" --batch-size=128
done
measure masking masking --batch-size=128
run "$python" -m jepa_jax train --config=configs/lejepa_digits.py --workdir="$out/digits" --config.log.every=1steps
# One job at a time: several small ones that share a GPU spend their minutes compiling and waiting for one another.
for seed in 0 1; do
  run "$python" -m jepa_jax train --config=configs/iwm_cifar10.py --workdir="$out/iwm_seed$seed" --config.seed="$seed" \
    --config.batch_size=256 --config.total="${IWM_STEPS:-40000}steps" "$@"
  run "$python" -m jepa_jax eval --workdir="$out/iwm_seed$seed" --evals=mrr,knn,predictor_tuning
done
for method in lejepa mmcr; do
  run "$python" -m jepa_jax train --config="configs/${method}_cifar10_resnet18.py" \
    --workdir="$out/${method}_cifar10_resnet18" --config.total="${EPOCHS:-300}ep" "$@"
  run "$python" -m jepa_jax eval --workdir="$out/${method}_cifar10_resnet18"
done
