"""`python -m jepa_jax tokenizer`: train one on captions and keep it, or see what one makes of texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa_jax.config import load_config
from jepa_jax.data import Tokenizer, read_tokenizer
from jepa_jax.data.caption_files import file_and_split, read_captions
from jepa_jax.data.images import make_tokenizer
from jepa_jax.data.tokenizer import train_tokenizer
from jepa_jax.runs import open_run
from jepa_jax.workdir import TOKENIZER, write_whole

_LENGTHS = (16, 24, 32, 48, 64, 77)
_SHOWN = ("a photo of a dog.", "Two dogs play in the snow.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.add_argument("action", choices=("train", "inspect"), help="train: write a new one; inspect: look at one")
  parser.add_argument("where", nargs="?", default="", metavar="FILE|WORKDIR", help="inspect: a tokenizer, or a run's")
  parser.add_argument("--captions", metavar="FILE[:SPLIT]", help="captions, in any form that data.captions takes")
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="train: on the captions of this config instead")
  parser.add_argument("--vocab-size", type=int, default=4000, metavar="N", help="train: ids at most (default: 4000)")
  parser.add_argument("--out", metavar="FILE", help="train: the JSON file to write, for data.captions.tokenizer")
  parser.add_argument("--text", action="append", metavar="TEXT", help="inspect: a text to take apart; may be repeated")
  parser.add_argument("--json", action="store_true", help="print JSON")


def run(
  action: str,
  where: str = "",
  captions: str | None = None,
  config: str | None = None,
  vocab_size: int = 4000,
  out: str | None = None,
  text: Sequence[str] | None = None,
  overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Returns {"vocab_size", "digest", "pieces": {text: tokens}}, and of captions how many tokens they take."""
  texts = _texts(captions) if captions else None
  if action == "inspect":
    if not where:
      raise ValueError("tokenizer inspect: name a tokenizer's JSON file, or the --workdir of a run")
    return _about(_find(Path(where).expanduser()), texts, text or _SHOWN)
  if not out or bool(captions) == bool(config):
    raise ValueError("tokenizer train: give --out=FILE.json, and either --captions=FILE or --config=FILE")
  if config:
    tokenizer = make_tokenizer(load_config(config, overrides).data)
  else:
    tokenizer = train_tokenizer(texts or (), vocab_size)
  write_whole(Path(out).expanduser(), tokenizer.json, overwrite=False)
  return _about(tokenizer, texts, text or _SHOWN) | {"written": out}


def _texts(captions: str) -> list[str]:
  found = read_captions(*file_and_split(Path(captions).expanduser()))
  return [text for own in (found if isinstance(found, list) else found.values()) for text in own]


def _find(path: Path) -> Tokenizer:
  if path.is_dir():
    if not (path / TOKENIZER).exists():  # a checkpoint holds it, too
      tokenizer = open_run(path).tokenizer
      if tokenizer is None:
        raise ValueError(f"the run in {path} was trained without captions, and has no tokenizer")
      return tokenizer
    path = path / TOKENIZER
  return read_tokenizer(path)


def _about(tokenizer: Tokenizer, texts: Iterable[str] | None, shown: Sequence[str]) -> dict[str, Any]:
  about: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "digest": tokenizer.digest}
  about["pieces"] = {text: tokenizer.tokens(text) for text in shown}
  if texts is not None:
    counts = np.array([len(tokenizer.tokens(text)) for text in texts])
    about["captions"] = {
      "number": len(counts),
      "tokens_mean": round(float(counts.mean()), 1),
      **{f"tokens_p{p}": int(np.percentile(counts, p)) for p in (95, 99)},
      "tokens_max": int(counts.max()),
      "longer_than_percent": {str(n): round(100 * float((counts > n).mean()), 2) for n in _LENGTHS},
    }
  return about


def render(result: Mapping[str, Any]) -> str:
  """Returns the text that the command prints."""
  lines = [f"{result['vocab_size']:,} ids, digest {result['digest']}"]
  lines += [f"  {text!r}: {' '.join(pieces)}" for text, pieces in result["pieces"].items()]
  if found := result.get("captions"):
    mean, p95, most = (found[f"tokens_{name}"] for name in ("mean", "p95", "max"))
    lines.append(f"{found['number']:,} captions: {mean} tokens on average, 95 % up to {p95}, the longest {most}")
    longer = ", ".join(f"{n}: {share} %" for n, share in found["longer_than_percent"].items())
    lines.append(f"cut at data.captions.length of {longer}")
  return "\n".join([*lines, *([f"Written to {result['written']}"] if "written" in result else [])])
