#!/usr/bin/env bash
# tokenizers 0.23.3, CPU.
#
# One expects: Tokenizer.get_vocab() gives the tokens in the order of their ids, or at least in one order: a dict keeps the order in which it was
# filled, and the same JSON file gives the same tokenizer.
# What happens: the order is that of a hash table whose seed is drawn anew in every process (and for every call), so two runs of one program
# list the same vocabulary in two orders. Ids are the same. Whatever takes "the first token that ..." from it, in a test or for a figure, differs from
# run to run; two hosts of one job that build something from this order disagree.
# Remedy: sort by id: sorted(vocab, key=vocab.get).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cd "$folder"
cat > order.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
tokenizer.train_from_iterator(["a dog and a boat"] * 20, trainers.BpeTrainer(vocab_size=300, show_progress=False))
vocab = tokenizer.get_vocab()
print(*list(vocab)[:12])
print(*sorted(vocab, key=vocab.get)[:12])
PY
for run in 1 2 3; do "$folder/venv/bin/python" order.py > "run$run"; cat "run$run"; done
# By id all three agree; as listed no two do.
[ "$(for run in 1 2 3; do sed -n 2p "run$run"; done | sort -u | wc -l)" = 1 ]
[ "$(for run in 1 2 3; do sed -n 1p "run$run"; done | sort -u | wc -l)" -gt 1 ]
