#!/usr/bin/env bash
# grain 0.2.18, CPU.
#
# One expects: to shuffle a small data set costs no more, for each example, than to shuffle a large one.
# What happens: index_shuffle, which MapDataset.shuffle calls for every example of every epoch, permutes at least 2^16
# numbers and tries again until the result lies in the data set: 65,536 / N times on average. With 64 examples one index
# takes 40 to 100 times as long as with 60,000 (some microseconds), with 2 it takes milliseconds. A batch of 16 from a set of 64,
# as tests and first tries have it, then waits for its order longer than for anything else, and Python's lock is held.
# Remedy: none in grain's settings; from about 10,000 examples on it does not matter. An order of one's own
# (numpy.random.Generator.permutation, once per epoch) for sets that are smaller.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import grain


def microseconds(num_examples, num_indices=300):
  order = grain.MapDataset.range(num_examples).shuffle(7).repeat()
  plain = grain.MapDataset.range(num_examples).repeat()
  found = []
  for data in (order, plain):
    began = time.process_time()
    for i in range(num_indices):
      data[i]
    found.append((time.process_time() - began) / num_indices * 1e6)
  print(f"{num_examples:7,d} examples: {found[0]:8.1f} us an index shuffled, {found[1]:5.1f} us in order", flush=True)
  return found[0] - found[1]


small, large = [microseconds(n) for n in (64, 1_797, 60_000)][::2]
sys.exit(0 if small > 20 * large else 1)
PY
