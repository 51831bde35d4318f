#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0), CPU.
#
# One expects: CLIPTextModel pools at the first token whose id is config.eos_token_id, whatever that id is; tokenizers trained with
# the usual special tokens <pad> <s> </s> give the end the id 2.
# What happens: with eos_token_id=2, and only then, it pools at the LARGEST id of the text (a rule kept for OpenAI's checkpoints, whose
# configs say 2 where their end is 49407). A model with a vocabulary of its own then gives the features of some rare word, without a warning.
# Here the same weights and the same text, with the end renamed from 2 to 1 in config and input: the pooled output is the last
# token's for 1 and another token's for 2.
# Remedy: give the end another id than 2 when a tokenizer is trained, or the largest.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import CLIPTextConfig, CLIPTextModel

pooled_at = {}
for end, start in ((1, 2), (2, 1)):
  torch.manual_seed(0)
  sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
  config = CLIPTextConfig(**sizes, max_position_embeddings=8, bos_token_id=start, eos_token_id=end, pad_token_id=0)
  model = CLIPTextModel(config).eval()
  ids = torch.tensor([[start, 7, 40, 9, end, 0, 0, 0]])
  with torch.no_grad():
    out = model(input_ids=ids)
  distance = (out.last_hidden_state[0] - out.pooler_output[0]).abs().amax(1)
  pooled_at[end] = int(distance.argmin())
  print(f"eos_token_id={end}: ids {ids[0].tolist()}, pooled at place {pooled_at[end]}; the end is at place 4", flush=True)
sys.exit(0 if pooled_at == {1: 4, 2: 2} else 1)
PY
