"""Small image files for the tests of the data."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from jepa_jax.data import DataConfig


def encode(pixels, image_format="PNG", **options) -> bytes:
  buffer = io.BytesIO()
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  image.save(buffer, image_format, **options)
  return buffer.getvalue()


def flat_image(value: int, height: int = 8, width: int = 8) -> np.ndarray:
  return np.full((height, width, 3), value, np.uint8)


def write_folder(root, num_images: int, corrupt=(), num_classes: int = 2):
  """Writes image i, of grey value i, into class i % num_classes; returns the files in the order of their names."""
  for i in range(num_images):
    folder = root / f"class{i % num_classes}"
    folder.mkdir(parents=True, exist_ok=True)
    data = b"not an image" if i in corrupt else encode(flat_image(i))
    (folder / f"{i:03d}.png").write_bytes(data)
  return sorted(root.rglob("*.png"))


def digits(**changes) -> DataConfig:
  grey = {"channels": 1, "mean": (0.5,), "std": (0.5,)}
  return DataConfig(**{"source": "digits", "canvas_px": 32, "num_threads": 2, "prefetch": 2} | grey | changes)


TFDS_BUILDER = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

class TinyPictures(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, _):
    return {"train": self._generate_examples(8), "test": self._generate_examples(3)}

  def _generate_examples(self, num_images):
    for i in range(num_images):
      buffer = io.BytesIO()
      Image.fromarray(np.full((5, 6, 3), i, np.uint8)).save(buffer, "PNG")
      yield str(i), {"image": b"broken" if i == 5 else buffer.getvalue(), "label": (i + shift) % 2}

for shift, folder in enumerate(sys.argv[1:]):
  TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
"""


def prepare_tiny_pictures(*folders: str) -> None:
  """Prepares the TFDS data set `tiny_pictures` in each folder: the same images, each time with the labels swapped.

  Picture i of 8 (test: of 3) has the grey value i, and picture 5 of training does not decode.
  """
  run_python(TFDS_BUILDER, *folders)


def run_python(code: str, *arguments: str) -> str:
  root = Path(__file__).parents[1]
  done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root)
  assert done.returncode == 0, done.stderr
  return done.stdout
