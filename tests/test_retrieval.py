"""Retrieval and zero-shot on plain arrays: the oracle, every caption right, ties, equal texts, prompts."""

from __future__ import annotations

import numpy as np
import pytest

from jepa_jax.data.tokenizer import train_tokenizer
from jepa_jax.evals import zero_shot
from jepa_jax.evals.retrieval import Retrieval, recalls, same_text
from jepa_jax.evals.zero_shot import ZeroShot, class_embeddings, class_prompts, class_ranks

R = np.random.RandomState(2)
IMAGES = R.randn(6, 4)
TEXTS = (IMAGES.repeat(5, 0) + 1.2 * R.randn(30, 4)).reshape(6, 5, 4)


def test_recalls_are_those_of_the_oracle():
  found = recalls(IMAGES, TEXTS, (1, 2, 3, 5))
  expected = {"i2t": (2 / 3, 2 / 3, 5 / 6, 1), "t2i": (0.7, 26 / 30, 28 / 30, 29 / 30)}
  for way, values in expected.items():
    np.testing.assert_allclose([found[f"{way}_r{k}"] for k in (1, 2, 3, 5)], 100 * np.array(values), rtol=1e-6)
  assert found["images"] == 6 and found["texts"] == 30
  assert found["rsum"] == pytest.approx(8 * found["mean"]) == pytest.approx(100 * sum(map(sum, expected.values())))


def test_the_first_caption_alone_is_another_number():
  found = recalls(IMAGES, TEXTS[:, :1], (1,))
  assert (found["i2t_r1"], found["t2i_r1"]) == pytest.approx((100 / 3, 200 / 3))


def test_by_hand_with_all_in_memory():
  rng = np.random.RandomState(0)
  image, text = rng.randn(40, 8), rng.randn(40, 3, 8)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  similar = unit(text).reshape(120, 8) @ unit(image).T
  own = similar[np.arange(120), np.arange(120) // 3]
  found = recalls(image, text)
  for k in (1, 5, 10):
    assert found[f"t2i_r{k}"] == pytest.approx(100 * (1 + (similar > own[:, None]).sum(1) <= k).mean())
    nearest = np.argsort(-similar.T, axis=1)[:, :k] // 3
    assert found[f"i2t_r{k}"] == pytest.approx(100 * (nearest == np.arange(40)[:, None]).any(1).mean())


def test_constant_embeddings_have_middle_ranks():
  found = recalls(np.ones((10, 3)), np.ones((10, 5, 3)))
  assert found["t2i_median"] == 5.5 and found["i2t_median"] == 23.5 and found["t2i_r1"] == 0
  assert found["chance_t2i_r1"] == 10


def test_captions_that_an_image_has_not_count_nowhere():
  text = np.concatenate([TEXTS, np.zeros((6, 2, 4))], axis=1)
  assert recalls(IMAGES, text, (1, 2)) == recalls(IMAGES, TEXTS, (1, 2))
  text[3] = 0
  with pytest.raises(ValueError, match="1 images have no caption"):
    recalls(IMAGES, text)


def test_a_text_that_two_images_share_counts_for_both_in_the_second_number():
  image = np.eye(4)[:3]
  text = np.stack([image, image], axis=1)
  text[0, 1], text[1, 1] = [0, 1, 0.1, 0], [0, 1, 0.1, 0]  # "a dog" of images 0 and 1, near to image 1
  ids = np.array([[[1, 5, 2], [1, 6, 2]], [[1, 7, 2], [1, 6, 2]], [[1, 8, 2], [-1, -1, -1]]])
  number = same_text(ids)
  assert number[0, 1] == number[1, 1] and number[2, 1] == -1
  text[2, 1] = 0
  found = recalls(image, text, (1,), number)
  assert found["t2i_r1"] == pytest.approx(80) and found["t2i_same_text_r1"] == 100
  twins = np.stack([np.eye(4)[0], np.eye(4)[0], np.eye(4)[1]])  # the first two look alike, and share a text
  found = recalls(twins, twins[:, None], (1,), np.array([[0], [0], [1]]))
  assert found["t2i_r1"] == pytest.approx(100 / 3) and found["t2i_same_text_r1"] == 100


def test_embeddings_that_are_no_numbers_are_refused_and_not_the_best():
  for image, text in ((IMAGES * np.nan, TEXTS), (IMAGES, TEXTS * np.inf)):
    with pytest.raises(ValueError, match="NaN or infinite"):
      recalls(image, text)
  with pytest.raises(ValueError, match="NaN or infinite"):
    class_ranks(IMAGES * np.nan, np.eye(4), np.zeros(6, int))


def test_prompts_that_are_cut_before_the_class_are_refused():
  tokenizer = train_tokenizer(["a photo of a dog", "a photo of a cat"], 300)
  with pytest.raises(ValueError, match="are cut before the class"):
    class_prompts(tokenizer, ["dog", "cat"], ("a photo of a {}.",), 5)


def test_ranks_that_cannot_be_are_named():
  with pytest.raises(ValueError, match="ranks from 1 on"):
    Retrieval(ks=(0,))


# ------------------------------------------------------------------------------------------------ zero-shot
def test_a_class_is_the_mean_of_its_unit_prompts_and_the_length_of_one_prompt_does_not_weigh():
  tokenizer = train_tokenizer(["a photo of a dog", "a photo of a cat"], 300)
  rng = np.random.RandomState(0)
  table = rng.randn(300, 5)

  def embed(ids, scale=(1.0, 1.0)):
    return np.stack([table[own[own >= 0]].mean(0) for own in ids]) * np.array(scale)[:, None]

  templates = ("a photo of a {}.", "a {}.")
  prompts = class_prompts(tokenizer, ["dog", "cat"], templates, 16)
  plain, scaled = class_embeddings(embed, prompts), class_embeddings(lambda ids: embed(ids, (1.0, 9.0)), prompts)
  np.testing.assert_allclose(plain, scaled, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-6)
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
  by_hand = unit(unit(embed(tokenizer.encode(["a photo of a dog.", "a dog."], 16))).mean(0))
  np.testing.assert_allclose(plain[0], by_hand, rtol=1e-6)


def test_the_rank_of_a_class_counts_equals_by_half():
  image, classes = np.eye(3), np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]])
  np.testing.assert_allclose(class_ranks(image, classes, np.array([0, 1, 0])), [1, 1.5, 2])


def test_only_frequent_words_are_known():
  tokenizer = train_tokenizer(["a dog and a boat"] * 20 + ["a xylograph"], 275)
  assert zero_shot._known("dog", tokenizer) and not zero_shot._known("xylograph", tokenizer)
  assert "og" in tokenizer.pieces and not zero_shot._known("og", tokenizer), "the end of a word is no word"


@pytest.mark.parametrize(
  ("settings", "message"),
  [({"templates": ("a dog",)}, "holds {} once"), ({"templates": ()}, "templates is empty")],
)
def test_templates_that_cannot_be_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    ZeroShot(**settings)


def test_templates_come_from_a_file_too(tmp_path):
  file = tmp_path / "templates.txt"
  file.write_text("a photo of a {}.\n\n  a drawing of the {}.\n", encoding="utf-8-sig")
  assert ZeroShot(templates_file=str(file)).texts() == ("a photo of a {}.", "a drawing of the {}.")
  file.write_text("a photo\n")
  with pytest.raises(ValueError, match="templates.txt: a template holds {} once, .* 'a photo'"):
    ZeroShot(templates_file=str(file)).texts()
  with pytest.raises(ValueError, match="templates_file=.*absent.txt: there is no such file"):
    ZeroShot(templates_file=str(tmp_path / "absent.txt")).texts()
