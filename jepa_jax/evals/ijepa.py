"""I-JEPA's linear probes: the paper (arXiv 2301.08243, appendix) reports the best of four."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.linear import probe_features


@dataclasses.dataclass(frozen=True)
class IJepaProbes(Protocol):
  """The best of four linear probes: of the last layer or of the last layers joined, with and without BatchNorm."""

  def run(self, subject: Subject) -> Iterator[Result]:
    for layers, kind in (("last layer", "pooled"), ("last layers", "probe")):
      for norm, title in (("none", layers), ("batchnorm", f"{layers}, BN")):
        found = probe_features(subject, kind, input_norm=norm)
        yield Result(subject.row, title, found.accuracy, dataclasses.asdict(found))


PROTOCOL = IJepaProbes
