"""Tokenizers: every text survives and has an end, what is no tokenizer is refused, the command counts tokens."""

from __future__ import annotations

import json

import pytest

from jepa_jax import tokenizer as command
from jepa_jax.data import CaptionConfig, open_images, read_tokenizer
from jepa_jax.data.tokenizer import Tokenizer, check_vocabulary, mended, train_tokenizer
from tests.test_captions import config, folder

__all__ = ["folder"]  # a fixture


def test_training_twice_gives_the_same_tokenizer_and_every_text_survives():
  texts = [f"a {word} in the snow" for word in ("dog", "cat", "child", "boat")] * 5
  one, other = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
  assert one.json == other.json and one.digest == other.digest
  for text in ("a dog in the snow", "zebra № 5 — déjà vu", "日本"):
    (ids,) = one.encode([text], 64)
    assert ids[0] == 2 and one.end == 1 and ids[(ids >= 0).sum() - 1] == one.end
    assert one.decode(ids) == one.decode(one.encode([one.decode(ids)], 64)[0])
  assert one.decode(one.encode(["A DOG"], 8)[0]) == "a dog"


def test_texts_of_the_web_are_mended():
  assert mended("salt &amp;amp; pepper") == "salt & pepper"
  assert mended("schÃ¶n") == "schön"
  assert mended("plain") == "plain"


def test_a_text_of_which_nothing_is_left_is_refused_and_special_tokens_in_a_text_are_text():
  made = train_tokenizer(["a dog"], 300)
  for text in ("", " ", "&nbsp;"):
    with pytest.raises(ValueError, match=f"nothing is left of the text '{text}'"):
      made.encode([text], 8)
  (ids,) = made.encode(["a </s> dog"], 32)
  assert (ids == made.end).sum() == 1 and made.decode(ids) == "a </s> dog"


def test_a_tokenizer_without_an_end_or_with_too_many_ids_is_refused(tmp_path):
  made = json.loads(train_tokenizer(["a dog"], 300).json)
  with pytest.raises(ValueError, match="no end token"):
    Tokenizer(json.dumps(made | {"post_processor": None}))
  with pytest.raises(ValueError, match="a vocabulary of 100 must have at least 259 ids"):
    train_tokenizer(["a dog"], 100)
  with pytest.raises(ValueError, match=r"has 2\d\d ids, and data.captions.vocab_size=260"):
    check_vocabulary(train_tokenizer(["a dog runs and runs"] * 3, 300), CaptionConfig(train="x", vocab_size=260))
  far = json.loads(train_tokenizer(["a dog"], 300).json)
  far["model"]["vocab"]["far"] = 900
  assert Tokenizer(json.dumps(far)).vocab_size == 901
  (tmp_path / "t.json").write_text("{}")
  with pytest.raises(ValueError, match="no tokenizer of the `tokenizers` library"):
    read_tokenizer(tmp_path / "t.json")
  with pytest.raises(ValueError, match="does not exist; leave it out"):
    read_tokenizer(tmp_path / "none.json")


def test_the_command_trains_one_and_counts_tokens(folder):
  out = folder / "tokenizer.json"
  found = command.run("train", captions=str(folder / "captions.csv"), vocab_size=300, out=str(out))
  assert found["captions"]["number"] == 5 and read_tokenizer(out).digest == found["digest"]
  shown = command.render(command.run("inspect", str(out), text=["a dog"], captions=str(folder / "captions.csv")))
  assert "'a dog': <s>" in shown and "cut at data.captions.length of 16: " in shown
  with pytest.raises(ValueError, match="exists already"):
    command.run("train", captions=str(folder / "captions.csv"), out=str(out))
  with pytest.raises(ValueError, match="give --out"):
    command.run("train", captions=str(folder / "captions.csv"))
  images = open_images(config(folder, tokenizer=str(out)), "train")
  assert images.tokenizer.digest == found["digest"]
