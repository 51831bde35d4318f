#!/usr/bin/env bash
# transformers 5.24.0 writes, 4.57.6 reads; torch 2.13, CPU.
#
# One expects: save_pretrained of a ViTMAEForPreTraining writes the names of the published files
# (decoder.decoder_layers.0...), which version 5 reads, and version 4 wrote.
# What happens: a rule that is for the encoder (layers -> encoder.layer) also takes the decoder's blocks, and the file has
# decoder.decoder_encoder.layer.0... Version 5 reads both. Version 4 finds no block of the decoder, warns, and begins it at
# random; so does anything else that goes by the published names.
# Remedy: rename the keys in the file, decoder_encoder.layer. -> decoder_layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
  "${PYTHON:-python3}" -m venv "$folder/venv$version"
  "$folder/venv$version/bin/pip" install -q torch==2.13.0 numpy transformers==$version
done
cd "$folder"
cat > write.py <<'PY'
import safetensors
import transformers

sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
decoder = {f"decoder_{key}": value for key, value in sizes.items()}
config = transformers.ViTMAEConfig(**sizes, **decoder, image_size=32, patch_size=8)
transformers.ViTMAEForPreTraining(config).save_pretrained("saved")
with safetensors.safe_open("saved/model.safetensors", "pt") as file:
  print(sorted(key for key in file.keys() if "decoder" in key and "layernorm_before.weight" in key))
PY
cat > read.py <<'PY'
import transformers

_, info = transformers.ViTMAEForPreTraining.from_pretrained("saved", output_loading_info=True)
print(transformers.__version__, "lacks", len(info["missing_keys"]), "arrays, does not read", len(info["unexpected_keys"]))
PY
written=$("$folder/venv5.24.0/bin/python" write.py 2>/dev/null | tail -1)
new=$("$folder/venv5.24.0/bin/python" read.py 2>/dev/null | tail -1)
old=$("$folder/venv4.57.6/bin/python" read.py 2>/dev/null | tail -1)
printf '%s\n' "$written" "$new" "$old"
[[ $written == *decoder_encoder.layer.0* && $new == "5.24.0 lacks 0 arrays, does not read 0" && $old == "4.57.6 lacks 16 arrays"* ]]
