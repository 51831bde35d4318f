#!/usr/bin/env bash
# jax 0.10.2, the persistent compilation cache in a local folder.
#
# One expects: an entry that was cut short (a machine that lost power, a full disk) is compiled again once and written anew.
# What happens: a warning, and the program is compiled at this start and at every later one: the writer leaves a file
# alone that is already there, whole or not. What helps is to remove the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cd "$folder"
cat > program.py <<'PY'
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
with warnings.catch_warnings(record=True) as said:
  warnings.simplefilter("always")
  jax.jit(lambda x: jnp.sin(x) @ x.T)(np.ones((64, 64), np.float32)).block_until_ready()
(file,) = [f for f in os.listdir("cache") if f.startswith("jit__lambda") and f.endswith("-cache")]
found = "taken from the cache" if hits else "compiled"
print(f"{found}; the file has {os.path.getsize(f'cache/{file}')} bytes; {len(said)} warning(s)")
PY
start() {
  JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 venv/bin/python program.py 2>/dev/null
}
printf '1. empty cache: '; start
printf '2. again:       '; start | tee second
truncate -s 100 cache/jit__lambda*-cache
printf '3. cut short:   '; start
printf '4. again:       '; start | tee fourth
rm cache/jit__lambda*-cache
start > /dev/null
printf '5. removed, 2nd:'; start | tee sixth
grep -q "taken from the cache" second
grep -q "compiled; the file has 100 bytes" fourth
grep -q "taken from the cache" sixth
