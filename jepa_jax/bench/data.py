"""Data: images per core and second from every source, beside the limit that decoding sets; and a folder's listing."""

from __future__ import annotations

import argparse
import functools
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from jepa_jax.bench.timing import alternating_ms
from jepa_jax.data import DataConfig, open_images, open_source, write_array_record
from jepa_jax.data.decode import Fit, decode_image

DESCRIPTION = "Images per core and second from every source, and the share of what decoding allows; a folder's listing."
_WIDTH, _HEIGHT, _QUALITY, _BLOCK = 500, 375, 92, 64
_ASPECT = 1.3333


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("--images", type=int, default=256, help="JPEGs of 500 x 375 px (default: %(default)s)")
  parser.add_argument("--canvas-px", type=int, default=256, help="their shorter side, decoded (default: %(default)s)")
  parser.add_argument("--repeats", type=int, default=5, help="timed passes of each source (default: %(default)s)")
  parser.add_argument("--files", type=int, default=20_000, help="of a folder that is listed; 0: none")


def run(images: int = 256, canvas_px: int = 256, repeats: int = 5, files: int = 20_000) -> dict[str, Any]:
  """Returns, for JSON, images/s on one thread: "decode" by parts, and by source with its ratio to ArrayRecord.

  The pictures are cut from scikit-learn's two photos. Files lie in the page cache: the disk is not what is measured.
  ValueError for counts that cannot be.
  """
  if images < 2 or repeats < 1 or files < 0:
    raise ValueError(f"images={images} is at least 2, repeats={repeats} at least 1, files={files} 0 or more")
  encoded = [jpeg(i) for i in range(images)]
  with tempfile.TemporaryDirectory() as folder:
    root, before = Path(folder), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")  # of parquet's copy and the index of the shards
    try:
      result = {
        "pictures": f"{images} JPEGs of {_WIDTH} x {_HEIGHT} px, {np.mean([len(x) for x in encoded]) / 1e3:.0f} kB",
        "canvas_px": canvas_px,
        "decode": _decoding(encoded, canvas_px, repeats),
        "sources": _sources(encoded, root, canvas_px, repeats),
      }
      limit = result["decode"]["plain_per_s"]
      for row in result["sources"].values():
        row["share_of_plain_decode"] = round(row["per_s"] / limit, 3)
      return result | ({"listing": _listing(root / "many", files)} if files else {})
    finally:
      os.environ.pop("XDG_CACHE_HOME")
      if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@functools.cache
def _photos() -> list[np.ndarray]:
  return load_sample_images().images


def jpeg(number: int) -> bytes:
  """Returns an encoded part of one of two photos."""
  rng, photo = np.random.default_rng(number), Image.fromarray(_photos()[number % 2])
  left, top = rng.integers(0, photo.width - 560), rng.integers(0, photo.height - 420)
  buffer = io.BytesIO()
  cut = photo.crop((left, top, left + 560, top + 420)).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
  cut.save(buffer, "JPEG", quality=_QUALITY)
  return buffer.getvalue()


def _fit(canvas_px: int) -> Fit:
  return Fit(canvas_px, round(canvas_px * _ASPECT))


def _decoding(encoded: list[bytes], canvas_px: int, repeats: int) -> dict[str, float]:
  """Returns images/s: decoded and no more, as it is done here, and with Pillow's bicubic resize, as up to version 0.2;
  and by how many dB the two differ."""
  fit = _fit(canvas_px)

  def plain(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
      return np.asarray(opened.convert("RGB"))

  def bicubic(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
      target = fit.target(*opened.size)
      opened.draft("RGB", target)
      return fit.cut(np.asarray(opened.convert("RGB").resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)))

  ours = lambda data: decode_image(data, fit, 3)
  ways: dict[str, Callable[[bytes], np.ndarray]] = {"plain": plain, "ours": ours, "bicubic": bicubic}
  times_ms = alternating_ms(
    {name: lambda way=way: [way(x) for x in encoded] for name, way in ways.items()}, (), repeats
  )
  error = np.mean([np.square(ours(x).astype(float) - bicubic(x)).mean() for x in encoded[:32]])
  per_s = {f"{name}_per_s": round(1e3 * len(encoded) / statistics.median(ms), 1) for name, ms in times_ms.items()}
  ratio = statistics.median(b / a for a, b in zip(times_ms["ours"], times_ms["bicubic"], strict=True))
  return per_s | {"over_bicubic": round(ratio, 2), "psnr_db": round(float(10 * np.log10(255**2 / max(error, 1e-9))), 1)}


def _sources(encoded: list[bytes], root: Path, canvas_px: int, repeats: int) -> dict[str, dict[str, float]]:
  """Returns images/s from each source, and the ratio of ArrayRecord's time to its own, in turns."""
  settings = _written(encoded, root)
  common = {"canvas_px": canvas_px, "max_aspect": _ASPECT, "root": str(root), "cache_mb": 0, "num_threads": 1}
  opened = {name: open_images(DataConfig(**common, **own), "train") for name, own in settings.items()}
  blocks = np.array_split(np.random.default_rng(0).permutation(len(encoded)), -(-len(encoded) // _BLOCK))
  passes = {name: lambda own=own: [own.read(block) for block in blocks] for name, own in opened.items()}
  times_ms = alternating_ms(passes, (), repeats)
  rows = {}
  for name, ms in times_ms.items():
    ratio = statistics.median(a / b for a, b in zip(times_ms["array_record"], ms, strict=True))
    rows[name] = {"per_s": round(1e3 * len(encoded) / statistics.median(ms), 1), "over_array_record": round(ratio, 3)}
  return rows


def _written(encoded: list[bytes], root: Path) -> dict[str, dict[str, str]]:
  """Writes the pictures in every form; returns the settings that read each."""
  import pyarrow as pa
  import pyarrow.parquet

  (root / "train").mkdir()
  for i, data in enumerate(encoded):
    (root / "train" / f"{i:06}.jpg").write_bytes(data)
  examples = ({"image": data, "label": 0, "name": str(i)} for i, data in enumerate(encoded))
  write_array_record(root / "a.array_record", examples, ["one"])
  images = pa.array([{"bytes": data, "path": None} for data in encoded])
  pyarrow.parquet.write_table(pa.table({"image": images, "label": pa.array([0] * len(encoded))}), root / "b.parquet")
  with tarfile.open(root / "c.tar", "w") as tar:
    for i, data in enumerate(encoded):
      for ending, content in (("jpg", data), ("cls", b"0")):
        info = tarfile.TarInfo(f"{i:06}.{ending}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
  offsets = np.cumsum([0, *map(len, encoded)])
  np.savez(root / "d.npz", data=np.frombuffer(b"".join(encoded), np.uint8), offsets=offsets)
  return {
    "array_record": {"source": "array_record", "train": "a.array_record"},
    "folder": {"source": "folder", "train": "train"},
    "npz": {"source": "npz", "train": "d.npz"},
    "parquet": {"source": "parquet", "train": "b"},
    "webdataset": {"source": "webdataset", "train": "c.tar"},
  }


def _listing(folder: Path, files: int) -> dict[str, float]:
  """Returns the seconds that it takes to open a folder of so many images in ten classes, and to fingerprint it."""
  for label in range(10):
    (folder / "train" / str(label)).mkdir(parents=True)
  for i in range(files):
    (folder / "train" / str(i % 10) / f"{i:07}.jpg").touch()
  cfg, times_s = DataConfig(source="folder", root=str(folder), canvas_px=8), []
  for _ in range(3):
    start_s = time.perf_counter()
    source = open_source(cfg, "train")
    listed_s = time.perf_counter() - start_s
    source.fingerprint()
    times_s.append((listed_s, time.perf_counter() - start_s - listed_s))
  listed_s, printed_s = (statistics.median(column) for column in zip(*times_s))
  million = 1e6 / files * (listed_s + printed_s)
  return {
    "files": files,
    "listed_s": round(listed_s, 3),
    "fingerprint_s": round(printed_s, 3),
    "million_s": round(million, 1),
  }
