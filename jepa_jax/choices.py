"""Settings that are one of a few words: declared by `Literal`, checked here, whoever makes them."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any, Literal


def check_choices(settings: Any) -> None:
  """Raises a ValueError, with the choices, where a `Literal` field of a dataclass holds another value."""
  for name, hint in typing.get_type_hints(type(settings)).items():
    if typing.get_origin(hint) is Literal:
      require_choice(name, getattr(settings, name), typing.get_args(hint))


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
  """Raises a ValueError unless value is among the choices."""
  if value not in choices:
    raise ValueError(
      f"{name} is {value!r}, but must be one of {', '.join(map(str, choices))}{did_you_mean(value, choices)}"
    )


def did_you_mean(value: Any, choices: typing.Iterable[str], cutoff: float = 0.6) -> str:
  """Returns "; did you mean 'x'?" for the nearest choice, or nothing where none is near."""
  near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1, cutoff=cutoff)
  return f"; did you mean {near[0]!r}?" if near else ""


def union_members(hint: Any) -> tuple[type, ...]:
  """Returns the classes of a union `A | B`, or nothing where hint is none."""
  is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
  return typing.get_args(hint) if is_union else ()
