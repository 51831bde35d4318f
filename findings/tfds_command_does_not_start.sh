#!/usr/bin/env bash
# tensorflow-datasets 4.9.10, CPU.
#
# One expects: what the documentation says, `pip install tensorflow-datasets` gives the command `tfds`; `tfds --help` lists what it can do, and
# `tfds build` prepares a data set. The package itself reads ArrayRecord without TensorFlow.
# What happens: the command does not start, not even for --help: its parser imports every subcommand, and the newest one, convert_format, names
# tf.train.Example in an annotation when it is imported. With TensorFlow installed (tried with tensorflow-cpu 2.21.0) it is stopped by the next line of
# that kind, a subclass of apache_beam's DoFn, which tensorflow-datasets does not depend on either.
# Remedy: the Python call needs neither beam nor the command: tfds.builder(NAME, file_format="array_record").download_and_prepare(). For the command:
# pip install tensorflow apache-beam.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tensorflow-datasets==4.9.10
cd "$folder"
"$folder/venv/bin/python" -c "import tensorflow_datasets as tfds; print(len(tfds.list_builders(with_community_datasets=False)) > 100)"
status=0
"$folder/venv/bin/tfds" --help > out 2>&1 || status=$?
tail -n 1 out
[ "$status" != 0 ]
grep -q "No module named 'tensorflow'" out
