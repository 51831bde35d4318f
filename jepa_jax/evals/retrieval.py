"""Retrieval between images and captions: recall at 1, 5 and 10 both ways, on all captions of the test images.

Each image has its own captions, and all of them are right: R@k of an image is a hit if any of them is among the k
nearest texts. Scoring one caption to one image, as is done here and there, gives other, lower numbers.

Legend: N images, C captions of an image, T captions of all images, D width of an embedding, R rows of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from jepa_jax.data import ImageSet
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import l2_normalised

_BLOCK = 512  # rows whose similarities to all others are held at a time


@dataclasses.dataclass(frozen=True)
class Retrieval(Protocol):
  """Images to captions and back: recalls at ranks `ks` over the test images, all captions of an image right.

  Attributes:
    ks: recalls at these ranks.
  """

  ks: tuple[int, ...] = (1, 5, 10)

  needs: ClassVar[frozenset[str]] = frozenset({"features", "encoder", "caption"})
  splits: ClassVar[tuple[str, ...]] = ("test",)
  reads: ClassVar[tuple[str, ...]] = ("image_embedding", "text_embedding")

  def __post_init__(self):
    if not self.ks or min(self.ks) < 1:
      raise ValueError(f"ks={self.ks} are ranks from 1 on, such as (1, 5, 10)")

  def run(self, subject: Subject) -> Iterator[Result]:
    image, text = (subject.features(name, self.splits).test for name in self.reads)
    image_NxD, text_NxCxD = np.asarray(image.pooled, np.float32), np.asarray(text.pooled, np.float32)
    text_NxCxD = text_NxCxD.reshape(len(text_NxCxD), -1, image_NxD.shape[1])
    ids = captions_of(subject.data.test, image.index)
    found = recalls(image_NxD, text_NxCxD, self.ks, same_text(ids))
    for name in ("i2t", "t2i"):
      for k in self.ks:
        yield Result(subject.row, f"{name} R@{k}", found[f"{name}_r{k}"])
    yield Result(subject.row, "mean R", found["mean"], found)


def captions_of(images: ImageSet, rows_N: np.ndarray) -> np.ndarray:
  """Returns the ids of the captions of these images, (N, C, L)."""
  parts = np.array_split(rows_N, max(1, -(-len(rows_N) // _BLOCK)))
  return np.concatenate([images.read(rows)["caption"] for rows in parts])


def same_text(ids_NxCxL: np.ndarray) -> np.ndarray:
  """Returns a number for every caption (N, C), equal where the texts are equal; -1 where there is none."""
  _, number = np.unique(ids_NxCxL.reshape(-1, ids_NxCxL.shape[-1]), axis=0, return_inverse=True)
  number_NxC = number.reshape(ids_NxCxL.shape[:2])
  return np.where(ids_NxCxL[:, :, 0] >= 0, number_NxC, -1)


def recalls(
  image_NxD: np.ndarray,
  text_NxCxD: np.ndarray,
  ks: tuple[int, ...] = (1, 5, 10),
  text_number_NxC: np.ndarray | None = None,
) -> dict[str, float]:
  """Returns recalls in percent, both ways, and what belongs to them.

  {"i2t_r<k>", "t2i_r<k>", "i2t_median", "t2i_median": median ranks, "mean": the mean of all recalls, "rsum": their sum,
  "images", "texts", "chance_t2i_r<k>"}, and, with text_number_NxC (equal where texts are), the same recalls with
  "_same_text" where the wording of another image's caption counts as right, too.

  A rank is 1 + the number of nearer ones + half of the equal ones: constant embeddings have middle ranks. A caption
  whose embedding is zero is none.

  Args:
    image_NxD: embeddings of any length.
    text_NxCxD: those of each image's captions.
  """
  check_finite(image_NxD, text_NxCxD)
  there_NxC = np.abs(text_NxCxD).max(-1) > 0
  if not there_NxC.any(1).all():
    raise ValueError(f"{(~there_NxC.any(1)).sum()} images have no caption; leave them out")
  image_NxD, text_TxD = l2_normalised(image_NxD), l2_normalised(text_NxCxD[there_NxC])
  owner_T = np.repeat(np.arange(len(image_NxD)), there_NxC.sum(1))
  ranks = {"t2i": _text_ranks(image_NxD, text_TxD, owner_T), "i2t": _image_ranks(image_NxD, text_TxD, owner_T)}
  if text_number_NxC is not None:
    number_T = text_number_NxC[there_NxC]
    ranks |= {
      "t2i_same_text": _text_ranks(image_NxD, text_TxD, owner_T, number_T),
      "i2t_same_text": _image_ranks(image_NxD, text_TxD, owner_T, number_T),
    }
  found = {f"{way}_r{k}": 100 * float((rank <= k).mean()) for way, rank in ranks.items() for k in ks}
  plain = [found[f"{way}_r{k}"] for way in ("t2i", "i2t") for k in ks]
  found |= {f"{way}_median": float(np.median(ranks[way])) for way in ("t2i", "i2t")}
  found |= {f"chance_t2i_r{k}": 100 * min(k / len(image_NxD), 1) for k in ks}
  return found | {
    "mean": float(np.mean(plain)),
    "rsum": float(np.sum(plain)),
    "images": len(image_NxD),
    "texts": len(text_TxD),
  }


def check_finite(*embeddings: np.ndarray) -> None:
  """Raises a ValueError for embeddings that are no numbers: nothing is nearer than NaN, so all would be found."""
  if not all(np.isfinite(z).all() for z in embeddings):
    raise ValueError("embeddings are NaN or infinite: the run has diverged, or its weights are damaged")


def _text_ranks(image_NxD, text_TxD, owner_T, number_T=None) -> np.ndarray:
  """Returns the rank of each text's own image among all; with number_T the best of the images that have this text."""
  ranks = []
  images_of = _images_by_text(owner_T, number_T)
  for start in range(0, len(text_TxD), _BLOCK):
    rows = slice(start, start + _BLOCK)
    similar_RxN = text_TxD[rows] @ image_NxD.T
    own_R = similar_RxN[np.arange(len(similar_RxN)), owner_T[rows]]
    if images_of is not None:
      right = [images_of[t] for t in range(start, start + len(similar_RxN))]
      own_R = np.array([row[images].max() for row, images in zip(similar_RxN, right)])
      for row, images in zip(similar_RxN, right):
        row[images] = -np.inf  # right ones do not stand in one another's way
    ranks.append(ranks_of(similar_RxN, own_R, equal_to_itself=images_of is None))
  return np.concatenate(ranks)


def _image_ranks(image_NxD, text_TxD, owner_T, number_T=None) -> np.ndarray:
  """Returns the best rank of each image's own texts among all; with number_T texts worded alike count as its own."""
  ranks = []
  for start in range(0, len(image_NxD), _BLOCK):
    similar_RxT = image_NxD[start : start + _BLOCK] @ text_TxD.T
    own_RxT = owner_T == np.arange(start, start + len(similar_RxT))[:, None]
    if number_T is not None:
      own_RxT = np.array([np.isin(number_T, number_T[own_T]) for own_T in own_RxT])
    best_R = np.where(own_RxT, similar_RxT, -np.inf).max(1)
    # Among the others: an image's own captions do not stand in one another's way.
    ranks.append(ranks_of(np.where(own_RxT, -np.inf, similar_RxT), best_R, equal_to_itself=0))
  return np.concatenate(ranks)


def _images_by_text(owner_T, number_T) -> list[np.ndarray] | None:
  if number_T is None:
    return None
  order = np.argsort(number_T, kind="stable")
  groups = np.split(owner_T[order], np.flatnonzero(np.diff(number_T[order])) + 1)
  found: list[np.ndarray] = [np.empty(0)] * len(number_T)
  place = 0
  for group in groups:
    for t in order[place : place + len(group)]:
      found[t] = group
    place += len(group)
  return found


def ranks_of(similar: np.ndarray, own: np.ndarray, equal_to_itself: int = 1) -> np.ndarray:
  """Returns 1 + how many of each row are nearer than its own + half of those that are equal, itself not counted."""
  nearer, equal = (similar > own[:, None]).sum(1), (similar == own[:, None]).sum(1)
  return 1 + nearer + (equal - equal_to_itself) / 2


PROTOCOL = Retrieval
