#!/usr/bin/env bash
# simplejpeg 1.9.0 (libjpeg-turbo), Pillow 12.3.0, CPU (x86-64).
#
# One expects: libjpeg-turbo decodes a JPEG straight to M/8 of its size, M = 1 to 16, so 3/4 takes about 3/4 of the time of the whole picture, or less.
# What happens: it takes longer than the whole: only the transforms of 8/8, 4/8, 2/8 and 1/8 are vectorised, those between are plain C. Halves, quarters
# and eighths are quicker, as expected. (Pillow's draft() offers just these.) So to scale 500 x 375 to 341 x 256, decode it whole.
# Beside it: at full size simplejpeg gives the very pixels that Pillow gives.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q simplejpeg==1.9.0 pillow==12.3.0 numpy
cd "$folder"
cat > scaled.py <<'PY'
import io, statistics, time
import numpy as np
import simplejpeg
from PIL import Image

rng = np.random.default_rng(0)
noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), np.uint8)).resize((1000, 750), Image.Resampling.BICUBIC)
buffer = io.BytesIO()
noise.save(buffer, "JPEG", quality=90)
data = buffer.getvalue()
assert np.array_equal(simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False), np.asarray(Image.open(io.BytesIO(data))))
whole = dict(fastdct=False, fastupsample=False)
ways = {"1": {}, "3/4": dict(min_height=563, min_width=750, min_factor=1), "1/2": dict(min_height=375, min_width=500, min_factor=1)}
times = {name: [] for name in ways}
for _ in range(41):
  for name, how in ways.items():
    start = time.perf_counter()
    shape = simplejpeg.decode_jpeg(data, **whole, **how).shape
    times[name].append(time.perf_counter() - start)
    assert shape[1] == {"1": 1000, "3/4": 750, "1/2": 500}[name], shape
median = {name: 1e3 * statistics.median(t) for name, t in times.items()}
print({name: f"{ms:.2f} ms" for name, ms in median.items()})
assert median["3/4"] > 1.05 * median["1"] and median["1/2"] < 0.9 * median["1"]
PY
"$folder/venv/bin/python" scaled.py
