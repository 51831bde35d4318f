"""Data sets of the Hugging Face hub by their id: fetched once, by its own library, and read as a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jepa_jax.data.config import DataConfig

PREFIX = "hub:"


def local_root(cfg: DataConfig) -> Path:
  """Returns the folder that data.root names; of "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION" where it was fetched to.

  Only files of the splits data.train and data.test are fetched, and only once: they stay in the hub's own cache.
  ValueError where that is not possible.
  """
  if not cfg.root.startswith(PREFIX):
    return Path(cfg.root_path)
  name, _, revision = cfg.root.removeprefix(PREFIX).partition("@")
  if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
    raise ValueError(f"data.root={cfg.root} is no id of the hub: write {PREFIX}OWNER/NAME, or a folder")
  splits = {split for split in (cfg.train, "" if cfg.held_out else cfg.test) if split}
  patterns = [form.format(split) for split in sorted(splits) for form in ("{}", "{}*", "data/{}*", "{}/*")]
  said = (
    f"data.root={cfg.root}: the data set could not be fetched ({{why}}). Fetched before, it would lie in {{cache}}; "
  )
  options = {"repo_type": "dataset", "revision": revision or None, "allow_patterns": patterns}
  return fetched(name, said + "or give a folder that holds its files", **options)


def fetched(repository: str, said: str, **options: Any) -> Path:
  """Returns the folder that holds a repository's files; ValueError where they cannot be fetched: `said`, with {why} and
  {cache} filled in."""
  hub = library()
  try:
    return Path(hub.snapshot_download(repository, **options))
  except (OSError, ValueError) as error:  # no network, no such repository, no permission
    why = (str(error).strip().splitlines() or [repr(error)])[0][:200]
    raise ValueError(said.format(why=why, cache=hub.constants.HF_HUB_CACHE)) from error


def library() -> Any:
  """Returns huggingface_hub; ValueError where it is not installed."""
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError("the hub needs huggingface_hub: python -m pip install huggingface_hub") from error
  return huggingface_hub
