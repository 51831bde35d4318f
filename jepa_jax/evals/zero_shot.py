"""Zero-shot classification: the class whose prompts, embedded by the text tower, are nearest to an image.

Legend: N images, K classes, T templates, D width of an embedding, L tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from jepa_jax.data import Tokenizer
from jepa_jax.evals.base import Protocol, Result, Subject
from jepa_jax.evals.blocks import l2_normalised
from jepa_jax.evals.retrieval import check_finite, ranks_of

# The prompt of CLIP's paper, and the seven that its authors found to do as well as eighty.
TEMPLATES = (
  "a photo of a {}.",
  "itap of a {}.",
  "a bad photo of the {}.",
  "a origami {}.",
  "a photo of the large {}.",
  "a {} in a video game.",
  "art of the {}.",
  "a photo of the small {}.",
)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Protocol):
  """Classes by their names alone, for methods with a text tower: the class whose prompts are nearest.

  Attributes:
    templates: texts with {} for the class; the mean of their unit embeddings stands for it.
    templates_file: a file with a template on each line, such as CLIP's eighty, in the place of `templates`.
    classes: a file with the name of each class on a line, in the order of the labels; empty: the names of the data.
  """

  templates: tuple[str, ...] = TEMPLATES
  templates_file: str = ""
  classes: str = ""

  needs: ClassVar[frozenset[str]] = frozenset({"features", "encoder", "labels"})
  splits: ClassVar[tuple[str, ...]] = ("test",)
  reads: ClassVar[tuple[str, ...]] = ("image_embedding",)

  def __post_init__(self):
    _check_templates(self.templates, "templates")

  def check(self, subject: Subject) -> None:
    if subject.data.tokenizer is None or "text_embedding" not in subject.objective.networks():
      raise ValueError("zero_shot compares images with texts, and this method has no text tower; leave it out")
    class_prompts(subject.data.tokenizer, self.names(subject), self.texts(), subject.objective.text.length)

  def texts(self) -> tuple[str, ...]:
    """Returns the templates; ValueError for a file of them that cannot be used."""
    if not self.templates_file:
      return self.templates
    texts = tuple(_lines(self.templates_file, "evals.zero_shot.templates_file"))
    _check_templates(texts, self.templates_file)
    return texts

  def names(self, subject: Subject) -> list[str]:
    """Returns the name of every class; ValueError where they are no words."""
    given = subject.data.train.class_names
    if self.classes:
      names = _lines(self.classes, "evals.zero_shot.classes")
      if len(names) != len(given):
        raise ValueError(f"{self.classes} names {len(names)} classes, and the data have {len(given)}: one on each line")
      return names
    if wordless := [name for name in given if not re.search(r"[^\W\d_]{2,}", re.sub(r"^n\d{8}$", "", name))]:
      raise ValueError(
        f"the data call a class {wordless[0]!r}, which is no word to ask for: write the names of all {len(given)} in a "
        "file, one on each line in the order of the labels, and give it in evals.zero_shot.classes"
      )
    return [name.replace("_", " ") for name in given]

  def run(self, subject: Subject) -> Iterator[Result]:
    names, texts, tokenizer = self.names(subject), self.texts(), subject.data.tokenizer
    assert tokenizer
    variables, apply_fn = subject.variables("text_embedding"), subject.apply_fn("text_embedding")
    embed = lambda ids: np.asarray(apply_fn(variables, ids[:, None]).pooled_BxD)
    class_KxD = class_embeddings(embed, class_prompts(tokenizer, names, texts, subject.objective.text.length))
    test = subject.features("image_embedding", self.splits).test
    known_N = test.label >= 0
    rank_N = class_ranks(np.asarray(test.pooled[known_N], np.float32), class_KxD, test.label[known_N])
    known = [name for name in names if _known(name, tokenizer)]
    detail = {
      "top5": 100 * float((rank_N <= 5).mean()),
      "class_names_in_vocabulary": len(known),
      "classes": len(names),
      "chance": 100 / len(names),
      "unknown": sorted(set(names) - set(known)),
      "templates": len(texts),
    }
    yield Result(subject.row, "zero-shot", 100 * float((rank_N <= 1).mean()), detail)
    yield Result(subject.row, "class names in vocabulary", 100 * len(known) / len(names))


def _lines(file: str, setting: str) -> list[str]:
  """Returns the lines of a text file that are not empty."""
  path = Path(file).expanduser()
  if not path.is_file():
    raise ValueError(f"{setting}={file}: there is no such file")
  return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _check_templates(texts: Sequence[str], where: str) -> None:
  if wrong := [text for text in texts if text.count("{}") != 1]:
    raise ValueError(f"{where}: a template holds {{}} once, where the class stands, and not: {wrong[0]!r}")
  if not texts:
    raise ValueError(f"{where} is empty: give one at least, such as 'a photo of a {{}}.'")


def class_prompts(
  tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], length: int
) -> dict[str, np.ndarray]:
  """Returns the ids of every class's prompts, int32 (T, L); ValueError where two classes have the same."""
  prompts = {name: tokenizer.encode([text.replace("{}", name) for text in templates], length) for name in names}
  if len(prompts) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"two classes are called {twice!r}: give each a name of its own in evals.zero_shot.classes")
  seen: dict[bytes, str] = {}
  for name, ids in prompts.items():
    for text, row in zip(templates, ids, strict=True):
      if (other := seen.setdefault(row.tobytes(), name)) != name:
        raise ValueError(
          f"{text.replace('{}', name)!r} and the prompt of {other!r} have the same {length} tokens: they are cut "
          "before the class. Give shorter evals.zero_shot.templates, or train with a longer data.captions.length"
        )
  return prompts


def class_embeddings(embed: Callable[[np.ndarray], np.ndarray], prompts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns a unit vector for every class (K, D): the mean of the unit embeddings of its prompts, normalised again.

  embed: ids int32 (T, L) -> (T, D).
  """
  return l2_normalised(np.stack([l2_normalised(embed(ids)).mean(0) for ids in prompts.values()]))


def class_ranks(image_NxD: np.ndarray, class_KxD: np.ndarray, label_N: np.ndarray) -> np.ndarray:
  """Returns the rank of each image's class among all (N,): 1 + the nearer ones + half of the equal ones."""
  check_finite(image_NxD, class_KxD)
  similar_NxK = image_NxD @ class_KxD.T
  return ranks_of(similar_NxK, similar_NxK[np.arange(len(label_N)), label_N])


def _known(name: str, tokenizer: Tokenizer) -> bool:
  """Whether every word of a name is a token of its own: the captions held it, or words that begin with it, often."""
  return all(map(tokenizer.is_one_token, name.split()))


PROTOCOL = ZeroShot
