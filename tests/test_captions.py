"""Captions: every form of file, matched to images by name; tokens with an end; what does not fit is said at once."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from jepa_jax import tokenizer as command
from jepa_jax.data import CaptionConfig, DataConfig, make_tokenizer, open_images, read_tokenizer
from jepa_jax.data.captions import read_captions
from jepa_jax.data.tokenizer import Tokenizer, check_vocabulary, mended, train_tokenizer

TEXTS = {"a.png": ["A dog runs, fast.", 'He said "no".'], "b.png": ["two cats"], "c.png": ["the red car", "a car"]}
CSV = 'image,caption\na.png,A dog runs, fast.\na.png,"He said ""no""."\nb.png,two cats\n'
CSV += "c.png,the red car\nc.png,a car\n"
KARPATHY = {
  "images": [
    {"filename": name, "split": "test" if name == "c.png" else "train", "sentences": [{"raw": t} for t in own]}
    for name, own in TEXTS.items()
  ]
}
COCO = {
  "images": [{"id": i, "file_name": name} for i, name in enumerate(TEXTS)],
  "annotations": [{"image_id": i, "caption": t} for i, own in enumerate(TEXTS.values()) for t in own],
}
FORMS = {
  "by_image.json": json.dumps(TEXTS),
  "karpathy.json": json.dumps(KARPATHY),
  "coco.json": json.dumps(COCO),
  "objects.json": json.dumps([{"image": name, "captions": own} for name, own in TEXTS.items()]),
  "metadata.jsonl": "\n".join(json.dumps({"file_name": n, "text": t}) for n, own in TEXTS.items() for t in own),
  "captions.csv": CSV,
  "plain.csv": CSV.split("\n", 1)[1],
  "Flickr8k.token.txt": "".join(f"{n}#{i}\t{t}\n" for n, own in TEXTS.items() for i, t in enumerate(own)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_form_of_file_says_the_same(tmp_path, name, packed):
  path = tmp_path / (name + ".gz" * packed)
  raw = FORMS[name].encode()
  path.write_bytes(gzip.compress(raw) if packed else raw)
  assert read_captions(path) == TEXTS


def test_quotes_are_part_of_a_text_where_they_are_none_of_csv_s(tmp_path):
  path = tmp_path / "results.token.txt"
  path.write_text('a.jpg#0\t"Go\nb.jpg#0\ttwo"\nb.jpg#1\t" Stop " sign\n')
  assert read_captions(path) == {"a.jpg": ['"Go'], "b.jpg": ['two"', '" Stop " sign']}
  path = tmp_path / "captions.csv"
  path.write_text('a.jpg,"Hello" said a man\r\nb.jpg,"an open quote\r\nc.jpg,"x, y"\r\n')
  assert read_captions(path) == {"a.jpg": ['"Hello" said a man'], "b.jpg": ['"an open quote'], "c.jpg": ["x, y"]}
  path.write_text("b#7,two\ra.jpg,one\ta tab\r")  # an old Mac's lines, a tab in a text, a name that ends in a number
  assert read_captions(path) == {"a.jpg": ["one\ta tab"], "b#7": ["two"]}
  lines = tmp_path / "m.jsonl"
  lines.write_text('{"file_name": "a.jpg", "text": "one\u2028two"}\n')
  assert read_captions(lines) == {"a.jpg": ["one\u2028two"]}


def test_flickr30k_as_it_is_published_and_on_the_hub(tmp_path):
  path = tmp_path / "results.csv"
  path.write_text("image_name| comment_number| comment\na.jpg| 0| A man , ok .\na.jpg| 1| Two.\n")
  assert read_captions(path) == {"a.jpg": ["A man , ok .", "Two."]}
  path = tmp_path / "annotations.csv"
  path.write_text('raw,split,filename\n"[""One."", ""Two.""]",train,a.jpg\n"[""Three.""]",test,b.jpg\n')
  assert read_captions(path, "train") == {"a.jpg": ["One.", "Two."]}
  assert read_captions(path) == {"a.jpg": ["One.", "Two."], "b.jpg": ["Three."]}


def test_names_match_whole_or_one_by_one_by_their_last_part(folder):
  (folder / "captions.csv").write_text("image,caption\npets/a.png,one\n./x/b.png,two\nC:\\y\\c.png,three\n")
  images = open_images(config(folder), "train")
  assert [images.tokenizer.decode(own[0]) for own in images.read(np.arange(3))["caption"]] == ["one", "two", "three"]


def test_a_subset_trains_its_tokenizer_on_its_own_captions(tmp_path):
  np.savez(tmp_path / "all.npz", images=np.zeros((40, 8, 8), np.uint8))
  (tmp_path / "captions.json").write_text(
    json.dumps([[f"word{'abcdefghij'[i % 10] * (1 + i // 10)}"] for i in range(40)])
  )
  captions = CaptionConfig(train="captions.json", vocab_size=400)
  own = {"channels": 1, "mean": (0.5,), "std": (0.5,), "captions": captions, "max_train": 4}
  cfg = DataConfig(source="npz", root=str(tmp_path), canvas_px=8, train="all.npz", test="all.npz", **own)
  from jepa_jax.data import open_source

  source = open_source(cfg, "train")
  assert source.captions() == [source[i]["captions"] for i in range(4)] and source.captions([2]) == [
    source[2]["captions"]
  ]


def test_a_list_has_no_names_and_karpathys_file_has_splits(tmp_path):
  (tmp_path / "list.json").write_text(json.dumps(list(TEXTS.values())))
  assert read_captions(tmp_path / "list.json") == list(TEXTS.values())
  (tmp_path / "k.json").write_text(FORMS["karpathy.json"])
  assert read_captions(tmp_path / "k.json", "test") == {"c.png": TEXTS["c.png"]}
  with pytest.raises(ValueError, match="of no image that it is of the split 'val'"):
    read_captions(tmp_path / "k.json", "val")


@pytest.fixture
def folder(tmp_path):
  for split in ("train", "test"):
    (tmp_path / split / "pets").mkdir(parents=True)
    for i, name in enumerate(TEXTS):
      Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(tmp_path / split / "pets" / name)
  (tmp_path / "captions.csv").write_text(CSV)
  return tmp_path


def config(folder, **captions):
  own = {"train": "captions.csv", "per_image": 2, "length": 8, "vocab_size": 300}
  return DataConfig(source="folder", root=str(folder), canvas_px=16, captions=CaptionConfig(**(own | captions)))


def test_rows_hold_the_ids_of_all_captions_of_an_image_matched_by_the_last_part_of_its_name(folder):
  images = open_images(config(folder), "test")
  assert images.columns["caption"].shape == (2, 8)
  rows = images.read(np.arange(3))["caption"]
  assert rows.dtype == np.int32 and (rows[1, 1] == -1).all()  # one caption only
  assert images.tokenizer.decode(rows[1, 0]) == "two cats"
  assert [images.tokenizer.decode(own) for own in rows[2]] == ["the red car", "a car"]
  long = rows[0, 0]
  assert (long >= 0).all() and long[-1] == images.tokenizer.end  # cut, and its end is there
  assert images.empty_rows(1)["caption"].max() == -1
  assert images.about()["tokenizer"] == images.tokenizer.digest


def test_captions_and_tokenizer_are_part_of_what_the_data_are(folder):
  before = open_images(config(folder), "train")
  (folder / "captions.csv").write_text(CSV.replace("two cats", "three cats"))
  make_tokenizer.cache_clear()
  assert open_images(config(folder), "train").fingerprint != before.fingerprint


def test_a_split_of_an_npz_file_and_a_list_of_captions(tmp_path):
  images = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8)
  np.savez(tmp_path / "all.npz", images=images, split=np.array([0, 0, 2, 0, 2, 1]))
  (tmp_path / "captions.json").write_text(json.dumps([[f"picture number {i}"] for i in range(6)]))
  captions = CaptionConfig(train="captions.json", vocab_size=300, per_image=1)
  gray = {"channels": 1, "mean": (0.5,), "std": (0.5,)}
  cfg = DataConfig(
    source="npz", root=str(tmp_path), canvas_px=8, train="all.npz:0", test="all.npz:2", captions=captions, **gray
  )
  train, test = open_images(cfg, "train"), open_images(cfg, "test")
  assert (len(train), len(test), test.num_classes) == (3, 2, 0)
  row = test.read(np.array([1]))
  assert test.tokenizer.decode(row["caption"][0, 0]) == "picture number 4" and row["canvas"][0, 0, 0] == images[4, 0, 0]
  with pytest.raises(ValueError, match="no image of the split '7'; it has 0, 1, 2"):
    open_images(DataConfig(source="npz", root=str(tmp_path), canvas_px=8, train="all.npz:7", **gray), "train")


def test_images_without_a_caption_are_refused_or_left_out(folder):
  (folder / "captions.csv").write_text(CSV.replace("b.png", "other.png"))
  with pytest.raises(ValueError, match=r"no captions of 1 of 3 images, such as pets/b\.png.*uncaptioned=drop"):
    open_images(config(folder), "train")
  assert len(open_images(config(folder, uncaptioned="drop"), "train")) == 2


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("image,caption\na.png,\n", r"a caption of pets/a\.png is empty"),
    ("image,caption\nx.png,one\n", r"names other images \(x\.png\) than there are"),
    ("a.png\n", "line 1 has no caption"),
    ("", "holds no caption"),
  ],
)
def test_captions_that_do_not_fit_are_named(folder, text, message):
  (folder / "captions.csv").write_text(text)
  with pytest.raises(ValueError, match=message):
    open_images(config(folder), "train")


def test_a_file_that_is_missing_lists_those_there_are(folder):
  with pytest.raises(ValueError, match=r"caption\.csv does not exist; .* holds captions\.csv"):
    open_images(config(folder, train="caption.csv"), "train")


@pytest.mark.parametrize(
  ("captions", "message"),
  [
    ({"train": ""}, "per_image is set, but train names no captions"),
    ({"per_image": 0}, "per_image=0 must be at least 1"),
    ({"length": 2}, "length=2 must be at least 3"),
    ({"vocab_size": 100}, "256 bytes, padding, start, end"),
    ({"uncaptioned": "keep"}, "refuse, drop"),
  ],
)
def test_settings_that_cannot_be_are_named(folder, captions, message):
  with pytest.raises(ValueError, match=message):
    config(folder, **captions)


def test_a_source_that_reads_no_captions_says_so(tmp_path):
  with pytest.raises(ValueError, match="source 'array_record' does not read it"):
    DataConfig(source="array_record", root=str(tmp_path), canvas_px=16, captions=CaptionConfig(train="x"))


# ------------------------------------------------------------------------------------------------ tokens
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
