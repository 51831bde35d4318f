"""The Hugging Face hub, through its own library: fetched from, pushed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa_jax.data.hub import fetched, library
from jepa_jax.weights.card import UNKNOWN

_FETCHED = [
  "config.json",
  "tokenizer.json",
  "preprocessor_config.json",
  "processor_config.json",
  "open_clip_config.json",
  "*.safetensors",
  "*.index.json",
]
_NEWER = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")
_OLDER = ["pytorch_model*.bin", "open_clip_pytorch_model.bin"]  # where a repository has nothing else


def download(repository: str) -> Path:
  """Returns the folder that holds a repository's files; ValueError where they cannot be fetched."""
  said = (
    f"{repository} could not be fetched from the Hugging Face hub ({{why}}). Or give a folder: what was fetched before "
  )
  said += f"lies in {{cache}}, and a folder {repository} here would be read first"
  folder = fetched(repository, said, allow_patterns=_FETCHED)
  if any((folder / name).exists() for name in _NEWER):
    return folder
  return fetched(repository, said, allow_patterns=[*_FETCHED, *_OLDER])


def push_folder(folder: str, to: str, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
  """Sends a folder that `export` wrote to a repository of the hub; returns {"to", "files": {name: MB}, "sent"}.

  ValueError for what is no such folder, and where its card has no licence.
  """
  path = Path(folder).expanduser()
  if not (path / "model.safetensors").exists() or not (path / "config.json").exists():
    raise ValueError(
      f"--from={folder} is no folder of `weights export --layout=hf`: it has no model.safetensors and config.json"
    )
  card = path / "README.md"
  if not card.exists() or f"license: {UNKNOWN}" in card.read_text():
    raise ValueError(f"{card} has no licence: write one in place of {UNKNOWN}, or export with --license=NAME")
  if to.count("/") != 1 or not all(to.split("/")):
    raise ValueError(f"--to={to} is no repository: write OWNER/NAME")
  files = {file.name: round(file.stat().st_size / 1e6, 3) for file in sorted(path.iterdir()) if file.is_file()}
  if not dry_run:
    api = library().HfApi()
    api.create_repo(to, private=private, exist_ok=True)
    api.upload_folder(repo_id=to, folder_path=str(path))
  return {"to": to, "files": files, "sent": not dry_run}
