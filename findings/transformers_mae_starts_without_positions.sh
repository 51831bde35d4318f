#!/usr/bin/env bash
# transformers 5.24.0 (5.23.0 too), torch 2.13, CPU.
#
# One expects: a new ViTMAEForPreTraining has the fixed sin-cos positions of the paper in its encoder and its decoder.
# What happens: both tables are zero (in 4.57.6 the decoder's alone). The encoder's rule for new weights leaves early, as
# its patch projection counts as initialised already; the decoder's table is filled when the layer is made, and set to zero
# by the rule after it. Neither is trained, so a pre-training from scratch never knows where a patch lies: patches that are
# exchanged give exchanged predictions, all removed patches of an image get the same one, and the loss still falls. Models
# that are loaded with from_pretrained are as they should be.
# Remedy: fill model.vit.embeddings.position_embeddings and model.decoder.decoder_pos_embed before training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
  "${PYTHON:-python3}" -m venv "$folder/venv$version"
  "$folder/venv$version/bin/pip" install -q torch==2.13.0 numpy transformers==$version
done
cd "$folder"
cat > program.py <<'PY'
import torch
import transformers

torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
decoder = {f"decoder_{key}": value for key, value in sizes.items()}
config = transformers.ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8, mask_ratio=0.0)
model = transformers.ViTMAEForPreTraining(config).eval()
tables = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
noise = torch.arange(16.0)[None]
image = torch.randn(1, 3, 32, 32)
swapped = image.clone()
swapped[..., :8, :8], swapped[..., 24:, 24:] = image[..., 24:, 24:], image[..., :8, :8]
with torch.no_grad():
  one, other = (model(x, noise=noise).logits[0] for x in (image, swapped))
order = [15, *range(1, 15), 0]
print(transformers.__version__.split(".")[0], end=" ")
print(*(f"{table.abs().max():.3f}" for table in tables), *(table.requires_grad for table in tables), end=" ")
print(f"{(one[order] - other).abs().max() / one.abs().max():.1e}")
PY
old=$("$folder/venv4.57.6/bin/python" program.py 2>/dev/null | tail -1)
new=$("$folder/venv5.24.0/bin/python" program.py 2>/dev/null | tail -1)
echo "version, largest position of encoder and decoder, are they trained, change of exchanged patches (relative)"
echo "$old"
echo "$new"
[[ $old == "4 1.000 0.000 False False "* && $new == "5 0.000 0.000 False False "* ]]
