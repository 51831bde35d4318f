"""Labels as people write them: numbers or text, in a row or a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_jax.data.sources.source import check_labels

_LARGEST = 2**31
_MANY, _SPARSE = 1000, 10  # classes, and numbers for each class, from which on numbers are only names


def as_classes(values: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
  """Returns labels int32 (n,), -1 for none, and the names of the classes.

  values: whole numbers, also as floats or booleans, of shape (n,) or (n, 1), -1 for none; or text, "" for none. names:
  of the classes 0, 1, ...; without them text names its own classes, in alphabetical order, and numbers are called by
  themselves; those from 1 on by 1, 2, ..., and where few of many
  numbers occur, only those are classes. ValueError, with the line that mends them, for others.
  """
  values = np.asarray(values)
  if values.ndim == 2 and values.shape[1] == 1:
    values = values[:, 0]
  if values.ndim == 2 and values.shape[1] > 1:
    raise ValueError(f"{where} are {values.shape}, a row for each image: give labels.argmax(1), one number for each")
  if values.ndim != 1 or values.dtype.kind not in "iubfUS":
    raise ValueError(f"{where} are {values.dtype} {values.shape}; they are whole numbers or text, (n,)")
  if names is not None and len(set(names)) < len(names):
    twice = next(name for name in names if list(names).count(name) > 1)
    raise ValueError(f"{where}: two classes are called {twice!r}; give each class a name of its own")
  if values.dtype.kind in "US":
    return _of_text(values, names, where)
  return _of_numbers(values, names, where)


def _of_text(values: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
  text = [(value.decode() if isinstance(value, bytes) else str(value)).strip() for value in values.tolist()]
  names = tuple(sorted(set(text) - {""})) if names is None else tuple(names)
  number = {name: i for i, name in enumerate(names)} | {"": -1}
  if unknown := sorted(set(text) - number.keys()):
    raise ValueError(f"{where} name the class {unknown[0]!r}, which is none of {', '.join(names[:10])}: name it there")
  return np.array([number[value] for value in text], np.int32), names


def _of_numbers(values: np.ndarray, names: Sequence[str] | None, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
  if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
    raise ValueError(f"{where} are {values.dtype} and no whole numbers: classes are 0, 1, 2, ..., and -1 is none")
  lowest, highest = (int(values.min()), int(values.max())) if len(values) else (-1, -1)
  if not -1 <= lowest <= highest < _LARGEST:
    raise ValueError(f"{where} run from {lowest} to {highest}; classes are 0, 1, 2, ..., and -1 is none")
  labels = values.astype(np.int32)
  known = np.unique(labels[labels >= 0])
  lowest = int(known[0]) if len(known) else -1
  if names is None and highest >= _MANY and _SPARSE * len(known) < highest:  # identifiers: those there are
    number = np.searchsorted(known, labels)
    return np.where(labels < 0, -1, number).astype(np.int32), tuple(map(str, known))
  if names is None and lowest == 1:
    return np.where(labels < 0, -1, labels - 1).astype(np.int32), tuple(map(str, range(1, highest + 1)))
  if names is not None and lowest == 1 and highest == len(names):
    raise ValueError(f"{where} run from 1 to {highest}, and there are {highest} names of classes: write labels - 1")
  names = tuple(map(str, range(highest + 1))) if names is None else tuple(names)
  check_labels(labels, names, where)
  return labels, names
