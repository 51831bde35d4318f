"""Weighted k-nearest-neighbour accuracy of frozen features: no training, no setting to select.

Legend: N training images, Q test images ("queries"), F features, K neighbours, C classes, B images of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jepa_jax.data import prefetch_to_device
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import (
  MEMORY_GB,
  Devices,
  Progress,
  Report,
  check_features,
  check_labelled,
  check_same_width,
  devices_of,
  l2_normalised,
  memory_bytes,
  ranges,
  rows_that_fit,
)

# Largest similarity block of a device, in float32 numbers (128 MB): queries are taken in chunks that keep below it.
_MAX_BLOCK = 2**25
_MAX_TRAIN_ROWS = 2**16  # of a block: more would leave chunks of few queries, and small products are slow


@dataclasses.dataclass(frozen=True)
class Knn(Protocol):
  """Weighted kNN on pooled features: k neighbours vote, with weights exp(similarity / temperature)."""

  k: int = 20
  temperature: float = 0.07

  def __post_init__(self):
    _checked_ks(self.k, self.temperature)

  def run(self, subject: Subject) -> Iterator[Result]:
    train, test = subject.features("image")
    options = dict(k=self.k, temperature=self.temperature, **subject.room())
    accuracy = knn_accuracy(train.pooled, train.label, test.pooled, test.label, subject.data.num_classes, **options)
    yield Result(subject.row, "knn", accuracy)


def knn_accuracy(
  train_x,
  train_y,
  test_x,
  test_y,
  num_classes: int,
  k: int | Sequence[int] = 20,
  temperature: float = 0.07,
  *,
  mesh: Mesh | None = None,
  memory_gb: float = MEMORY_GB,
  report: Report | None = None,
) -> float | dict[int, float]:
  """Returns the weighted kNN top-1 accuracy in percent; {k: accuracy} where k is a sequence.

  The classifier of Wu et al. 2018 (InstDisc, arXiv 1805.01978 Sec. 3.4), used by DINO: the k training images of
  highest cosine similarity vote for their class with weight exp(similarity / temperature). Features are not centred:
  give a raw-pixel baseline pixels less their mean, as a network sees them (15 000 training images of CIFAR-10: 41 %,
  against 32 % in [0, 1]).

  Args:
    train_x, test_x: (N, F), (Q, F) features, float16 or float32, also memory-mapped; other types are copied. Each row
      is L2-normalised here.
    train_y, test_y: (N,), (Q,) integer labels in [0, num_classes).
    k: neighbours; a k above N means all N.
    temperature: above zero; .07 in both papers.
    mesh: the queries are split over its devices, all of this process; None: the first local device.
    memory_gb: what this may hold on the host, and on each device. The search is exact, whatever it is.
    report: told how far the search is, at most every ten seconds.

  Raises:
    ValueError: features that are not finite, labels out of range, shapes that do not fit, k or temperature <= 0.
  """
  ks = _checked_ks(k, temperature)
  train = check_labelled("train", train_x, train_y, num_classes)
  test_QxF, test_y_Q = check_labelled("test", test_x, test_y, num_classes)
  predicted = _predictions(*train, test_QxF, num_classes, ks, temperature, mesh, memory_gb, report)
  accuracy = {each_k: 100.0 * float(np.mean(labels_Q == test_y_Q)) for each_k, labels_Q in predicted.items()}
  return accuracy if isinstance(k, Sequence) else accuracy[k]


def knn_predictions(
  train_x,
  train_y,
  test_x,
  num_classes: int,
  k: int | Sequence[int] = 20,
  temperature: float = 0.07,
  *,
  mesh: Mesh | None = None,
  memory_gb: float = MEMORY_GB,
  report: Report | None = None,
) -> dict[int, np.ndarray]:
  """Returns {k: predicted labels (Q,)}; arguments and errors as in knn_accuracy. A tie goes to the lower label."""
  ks = _checked_ks(k, temperature)
  train = check_labelled("train", train_x, train_y, num_classes)
  test_QxF = check_features("test", test_x)
  return _predictions(*train, test_QxF, num_classes, ks, temperature, mesh, memory_gb, report)


def _predictions(train_NxF, train_y_N, test_QxF, num_classes, ks, temperature, mesh, memory_gb, report):
  check_same_width(train_NxF, test_QxF)
  capped_ks = tuple(min(each_k, len(train_NxF)) for each_k in ks)
  devices, budget = devices_of(mesh), memory_bytes(memory_gb)
  parts = list(ranges(len(test_QxF), rows_that_fit(test_QxF.shape[1], budget // 4)))
  progress = Progress(report, "knn: training image", len(parts) * len(train_NxF))
  found = []
  for i, (start, stop) in enumerate(parts):
    progress.before = i * len(train_NxF)
    best = _nearest(test_QxF[start:stop], train_NxF, train_y_N, max(capped_ks), devices, budget, progress.at)
    votes = [_vote(*chunk, temperature, num_classes=num_classes, ks=capped_ks) for chunk in best]
    found.append(np.concatenate([np.asarray(labels) for labels in votes], axis=1)[:, : stop - start])
  return dict(zip(ks, np.concatenate(found, axis=1)))


def _nearest(test_QxF, train_NxF, train_y_N, k: int, devices: Devices, budget: int, tell) -> list[tuple]:
  """Returns (similarities, labels), each (B, K), of the nearest training images, for every chunk of the queries.

  The queries stay on the devices; each block of training images is read once and goes by all of them.
  """
  width = test_QxF.shape[1]
  blocks = list(ranges(len(train_NxF), min(_MAX_TRAIN_ROWS, rows_that_fit(width, budget // 16))))
  largest = max(stop - start for start, stop in blocks)
  per_device = math.ceil(len(test_QxF) / devices.ways)
  chunk = devices.ways * max(1, min(1024, per_device, min(_MAX_BLOCK, budget // 16) // largest))
  queries, best = [], []
  for start in range(0, len(test_QxF), chunk):
    block = l2_normalised(test_QxF[start : start + chunk])
    padded = np.pad(block, ((0, chunk - len(block)), (0, 0)))  # one shape, one compile
    queries.append(jax.device_put(padded, devices.rows))
    none = np.full((chunk, k), -np.inf, np.float32), np.zeros((chunk, k), np.int32)
    best.append(jax.device_put(none, devices.rows))
  read = ((start, (l2_normalised(train_NxF[start:stop]), train_y_N[start:stop])) for start, stop in blocks)
  with prefetch_to_device(read, lambda item: (item[0], jax.device_put(item[1], devices.whole)), size=1) as ahead:
    for start, block in ahead:
      for i, query in enumerate(queries):
        best[i] = _nearer(query, *best[i], *block)
        jax.block_until_ready(best[i - 1])  # the one before: the device always has one to go on with
        tell(start + (largest * i) // len(queries))
  return best


@jax.jit
def _nearer(query_QxF, top_QxK, label_QxK, train_BxF, train_y_B):
  """Returns (similarities, labels), each (Q, K), of the nearest of those so far and of one more block."""
  # Full float32 products: with TF32 or bf16 the ranking of near neighbours would depend on the machine.
  similarity_QxB = jnp.matmul(query_QxF, train_BxF.T, precision=jax.lax.Precision.HIGHEST)
  k = top_QxK.shape[1]
  # Without the barrier XLA merges what reads this into top_k and sorts the whole block: 14 times slower on a CPU.
  new_QxK, index_QxK = jax.lax.optimization_barrier(jax.lax.top_k(similarity_QxB, min(k, len(train_BxF))))
  # Of equals top_k takes the first: images of an earlier block, as if there were one block of all.
  both = jnp.concatenate([top_QxK, new_QxK], axis=1), jnp.concatenate([label_QxK, train_y_B[index_QxK]], axis=1)
  top_QxK, place_QxK = jax.lax.top_k(both[0], k)
  return top_QxK, jnp.take_along_axis(both[1], place_QxK, axis=1)


@functools.partial(jax.jit, static_argnames=("num_classes", "ks"))
def _vote(top_QxK, label_QxK, temperature, *, num_classes: int, ks: tuple[int, ...]):
  """Returns the winning labels (len(ks), Q) of one chunk of queries."""
  # Relative to the nearest neighbour: the same vote, and no temperature overflows.
  weight_QxK = jnp.exp((top_QxK - top_QxK[:, :1]) / temperature)
  row_Qx1 = jnp.arange(len(top_QxK))[:, None]
  empty_QxC = jnp.zeros((len(top_QxK), num_classes))
  winners = [jnp.argmax(empty_QxC.at[row_Qx1, label_QxK[:, :k]].add(weight_QxK[:, :k]), axis=-1) for k in ks]
  return jnp.stack(winners)


def _checked_ks(k: int | Sequence[int], temperature: float) -> tuple[int, ...]:
  ks = tuple(k) if isinstance(k, Sequence) else (k,)
  if not ks or any(each_k < 1 for each_k in ks):
    raise ValueError(f"k = {k}: every k must be 1 or more")
  if not temperature > 0:
    raise ValueError(f"temperature = {temperature}: must be above 0 (0.07 in InstDisc and DINO)")
  return ks


PROTOCOL = Knn
