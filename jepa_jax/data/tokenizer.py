"""Texts to numbers and back, by the `tokenizers` library: trained on captions, or read from its JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.data.caption_files import mended
from jepa_jax.data.captions import CaptionConfig

LEAST_IDS = 259  # 256 bytes and the special tokens
# The end is not number 2: transformers' CLIP takes the largest id for the end where its config says 2.
SPECIAL = ("<pad>", "</s>", "<s>")


class Tokenizer:
  """A tokenizer that ends every text with an end token: `encode` -> int32 ids, -1 after the end.

  Attributes:
    json: The whole of it, as the library writes it.
    digest: 16 hexadecimal digits that stand for it.
    vocab_size: Its largest id and one.
  """

  def __init__(self, text: str, where: str = "the tokenizer"):
    import tokenizers

    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
      raise ValueError(f"{where} is no tokenizer of the `tokenizers` library: {error}") from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._tokenizer.encode_special_tokens = True  # "</s>" in a caption is text, and no end
    ends = self._tokenizer.encode("").ids
    if not ends:
      raise ValueError(f"{where} puts no end token after a text: give it a post-processor that does")
    self.json, self.end, self.vocab_size = text, ends[-1], 1 + max(self._tokenizer.get_vocab().values())
    self._num_ends = len(ends)
    self.digest = digest_of(text)

  def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
    """Returns ids int32 (n, length): start and end included, -1 after the end; what is longer is cut before the end.

    ValueError for a text of which nothing is left.
    """
    ids = np.full((len(texts), length), -1, np.int32)
    for row, text in zip(ids, texts, strict=True):
      own = self._tokenizer.encode(mended(text)).ids
      if own[-1] != self.end:
        raise ValueError(f"the tokenizer puts no end after {text[:40]!r}: give it a post-processor that does")
      if len(own) <= self._num_ends or not self._tokenizer.decode(own, skip_special_tokens=True).strip():
        raise ValueError(f"nothing is left of the text {text[:40]!r} as tokens; take it out, or write another")
      own = own if len(own) <= length else [*own[: length - 1], self.end]
      row[: len(own)] = own
    return ids

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of ids, without special tokens."""
    return self._tokenizer.decode([int(i) for i in ids if i >= 0]).strip()

  def tokens(self, text: str) -> list[str]:
    """Returns the pieces that a text falls into."""
    return self._tokenizer.encode(mended(text)).tokens

  @property
  def pieces(self) -> frozenset[str]:
    """The vocabulary as the library writes it."""
    return frozenset(self._tokenizer.get_vocab())

  def is_one_token(self, word: str) -> bool:
    """Returns whether a word is a token of its own, as what the captions held often is (a word, or how words begin)."""
    return len(self.tokens(word)) == 1 + self._num_ends


def digest_of(text: str) -> str:
  """Returns 16 hexadecimal digits that stand for a tokenizer's JSON."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Returns a byte-level BPE tokenizer (lower case, NFKC) trained on these texts; the same texts give the same one."""
  import tokenizers

  if vocab_size < LEAST_IDS:
    raise ValueError(f"a vocabulary of {vocab_size} must have at least {LEAST_IDS} ids: 256 bytes, padding, start, end")
  from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator((mended(text) for text in texts), trainer)
  end, start = SPECIAL[1:]
  ends = [(token, made.token_to_id(token)) for token in (start, end)]
  made.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
  return Tokenizer(made.to_str())


def read_tokenizer(path: Path) -> Tokenizer:
  """Returns the tokenizer of a JSON file; ValueError where it is none."""
  if not path.is_file():
    raise ValueError(f"data.captions.tokenizer: {path} does not exist; leave it out to train one on the captions")
  try:
    text = path.read_text(encoding="utf-8")
    json.loads(text)
  except ValueError as error:
    raise ValueError(f"{path} is no JSON ({error}); a tokenizer is the tokenizer.json of the library") from error
  return Tokenizer(text, str(path))


def check_vocabulary(tokenizer: Tokenizer, cfg: CaptionConfig) -> None:
  """Raises a ValueError where the tokenizer has ids that the text tower's embedding has no row for."""
  if tokenizer.vocab_size > cfg.vocab_size:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} ids, and data.captions.vocab_size={cfg.vocab_size} has no rows for "
      f"all of them: set it to {tokenizer.vocab_size}"
    )
