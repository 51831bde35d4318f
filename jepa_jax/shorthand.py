"""Names for networks and methods on the command line: --config.encoder=vit_small/8 instead of four settings."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jepa_jax.choices import did_you_mean


def expand(overrides: Mapping[str, str], options: Mapping[str, Sequence[type]], tree: Mapping[str, Any]) -> dict:
  """Returns the overrides with "encoder": "vit_small/8" and the like as settings of their own.

  The name of a member of a union, after it a variant (in full, or as its letters: ViT-S, resnet50), and for patches
  "/8". What such a name says of the sizes replaces what the file says of them; what is typed besides stands.

  Args:
    overrides: dotted names and what was typed.
    options: the classes of each union that may be named so, by its dotted name; their `name` tells them apart.
    tree: the file's settings.
  """
  expanded = {}
  for key, text in overrides.items():
    if key not in options:
      expanded[key] = text
      continue
    own = _settings(key, text, options[key])
    of_file = tree.get(key, {})
    if isinstance(of_file, Mapping) and "variant" in own and of_file.get("name") == own["name"]:
      cls = next(cls for cls in options[key] if _name(cls) == own["name"])
      fields = {name: field.default for name, field in cls.__dataclass_fields__.items()}
      own |= {name: repr(fields[name]) for name in getattr(cls, "sizes_of_variant", ()) if name in of_file}
    expanded |= {f"{key}.{name}": value for name, value in own.items() if f"{key}.{name}" not in overrides}
  return expanded


def _name(cls: type) -> str:
  return cls.__dataclass_fields__["name"].default


def _settings(key: str, text: str, options: Sequence[type]) -> dict[str, str]:
  """Returns the settings that a name stands for; ValueError, with the names that there are."""
  plain = re.sub(r"[^a-z0-9/]", "", text.lower())
  plain, slash, patch = plain.partition("/")
  for cls in options:
    name = _name(cls)
    if not plain.startswith(name.replace("_", "")):
      continue
    rest = plain.removeprefix(name.replace("_", ""))
    variants = _variants(cls)
    fits = [v for v in variants if v == rest] or [v for v in variants if rest and v.startswith(rest)]
    if (rest and len(fits) != 1) or (slash and not (patch.isdigit() and "patch_size" in cls.__dataclass_fields__)):
      continue
    return {"name": name} | ({"variant": fits[0]} if rest else {}) | ({"patch_size": patch} if slash else {})
  known = [f"{_name(cls)}{f'_{v}' if v else ''}" for cls in options for v in ("", *_variants(cls))]
  raise ValueError(f"--config.{key}={text}: choose from {', '.join(known)}{did_you_mean(text, known)}")


def _variants(cls: type) -> tuple[str, ...]:
  hint = typing.get_type_hints(cls).get("variant")
  return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
