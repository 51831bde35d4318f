"""A source with captions beside its images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax.data.caption_files import SHOWN, Texts
from jepa_jax.data.captions import Names, captions_by_image
from jepa_jax.data.sources.source import Source, digest
from jepa_jax.data.sources.subset import SubsetSource

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

logger = logging.getLogger(__name__)


class CaptionedSource:
  """A source whose examples have `captions`, a list of texts; `texts` holds those of every image, in its order."""

  def __init__(self, source: Source, texts: Sequence[Texts]):
    self._source, self._texts, self.class_names = source, texts, source.class_names

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, index: int) -> dict:
    return self._source[index] | {"captions": self._texts[index]}

  def labels(self) -> np.ndarray:
    return self._source.labels()

  def captions(self, indices: Sequence[int] | None = None) -> list[Texts]:
    """Returns the captions of every image, or of these."""
    return [self._texts[int(i)] for i in (range(len(self)) if indices is None else indices)]

  def fingerprint(self) -> str:
    return digest(self._source.fingerprint(), list(self._texts))


def with_captions(
  source: Source,
  cfg: DataConfig,
  split: str,
  names: Names | None,
  rows: np.ndarray | None = None,
) -> Source:
  """Returns these rows of a source (default: all) with their captions, where the config names any.

  names: what the images are called, or None. ValueError for rows without a caption, unless they are to be dropped.
  """
  rows = np.arange(len(source)) if rows is None else rows
  texts: list[Texts] = []
  if cfg.captions.train:
    texts = captions_by_image(cfg.captions, split, Path(cfg.root_path), names, len(source))
    rows = captioned_rows(cfg, split, [len(own) for own in texts], rows, names and names.own)
  source = source if len(rows) == len(source) else SubsetSource(source, rows)
  return CaptionedSource(source, [texts[i] for i in rows]) if texts else source


def captioned_rows(
  cfg: DataConfig, split: str, counts: Sequence[int], rows: np.ndarray, names: Sequence[str] | None = None
) -> np.ndarray:
  """Returns those of the rows that have a caption, by the number that each image has; ValueError where not all have one
  and none are to be dropped, or none has any."""
  counts_N = np.asarray(counts)
  there = rows[counts_N[rows] > 0]
  without = [names[i] if names else f"number {i}" for i in rows[counts_N[rows] == 0][:SHOWN]]
  if len(there) < len(rows) and (cfg.captions.uncaptioned == "refuse" or not len(there)):
    raise ValueError(
      f"data.captions: {cfg.captions.of(split)} has no captions of {len(rows) - len(there)} of {len(rows)} images, "
      f"such as {', '.join(without)}. Caption them, or leave these images out: data.captions.uncaptioned=drop"
    )
  if len(there) < len(rows):
    said = "%s has no captions of %d of %d images, such as %s: they are left out"
    logger.warning(said, cfg.captions.of(split), len(rows) - len(there), len(rows), ", ".join(without))
  least, most = counts_N[there].min(), counts_N[there].max()
  if least < most:
    said = "%s: images have %d to %d captions; those with fewer are seen with their own, more often"
    logger.info(said, cfg.captions.of(split), least, most)
  return there
