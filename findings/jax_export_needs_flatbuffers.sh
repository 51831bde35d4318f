#!/usr/bin/env bash
# jax 0.10.2, CPU.
#
# One expects: jax.export is a part of jax, so a function that was exported, serialised and sent to somebody is read and run there with jax alone: that is
# what it is for. `import jax.export` works after `pip install jax`, and so do export() and call().
# What happens: serialize() and deserialize() both end with an ImportError: they are written by flatbuffers, which jax does not depend on, not even in an
# extra. Tests do not show it where TensorFlow, LiteRT or another package has brought it along. Whoever is sent a program needs it as much as the sender.
# Remedy: pip install flatbuffers, on both sides; name it beside jax in what goes with the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2
cat > "$folder/run.py" <<'PY'
import jax
import jax.export
import jax.numpy as jnp

exported = jax.export.export(jax.jit(jnp.sin))(jax.ShapeDtypeStruct((2,), jnp.float32))
print("exported and called:", exported.call(jnp.zeros(2)))
try:
  data = exported.serialize()
except ImportError as error:
  print("serialize:", error)
else:
  print("serialised", len(data), "bytes, read again:", jax.export.deserialize(data).call(jnp.zeros(2)))
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" | tee "$folder/out"
grep -q "serialize: .*flatbuffers" "$folder/out"
"$folder/venv/bin/pip" install -q flatbuffers==25.12.19
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" | tee "$folder/out"
grep -q "read again" "$folder/out"
