"""Captions: every form of file, matched to images by name; tokens with an end; what does not fit is said at once."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from jepa_jax.data import CaptionConfig, DataConfig, make_tokenizer, open_images, open_source
from jepa_jax.data.caption_files import read_captions
from tests.images import run_python

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


def test_a_line_with_more_cells_than_columns_has_separators_in_its_caption(tmp_path):
  path = tmp_path / "captions.csv"
  path.write_text('image_path,caption,split\na.jpg,A man, a dog,train\nb.jpg,"Two, three",test\nc.jpg,One,train\n')
  assert read_captions(path, "train") == {"a.jpg": ["A man, a dog"], "c.jpg": ["One"]}
  assert read_captions(path, "test") == {"b.jpg": ["Two, three"]}
  path.write_text("split,description,path\ntrain,A man, a dog,a.jpg\n")
  assert read_captions(path, "train") == {"a.jpg": ["A man, a dog"]}


def test_the_folders_of_a_name_may_stand_in_another_column(tmp_path):
  path = tmp_path / "captions.csv"
  path.write_text("filepath,filename,caption\ntrain,1.jpg,x\ntest,1.jpg,y\n")
  assert read_captions(path) == {"train/1.jpg": ["x"], "test/1.jpg": ["y"]}
  path.write_text("file,path,caption\n1.jpg,train/cat/1.jpg,x\n1.jpg,test/cat/1.jpg,y\n")
  assert read_captions(path) == {"train/cat/1.jpg": ["x"], "test/cat/1.jpg": ["y"]}
  path = tmp_path / "k.json"
  path.write_text(json.dumps([{"filename": "a.jpg", "filepath": "train/cat/a.jpg", "caption": "x"}]))
  assert read_captions(path) == {"train/cat/a.jpg": ["x"]}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("id;image;caption\n1;a.jpg;one\n", {"a.jpg": ["one"]}),
    ('"image";"caption"\n"a.jpg";"one"\n', {"a.jpg": ["one"]}),
    ("caption|image\none|a.jpg\n", {"a.jpg": ["one"]}),
    ("image,caption\na.jpg,\"['A dog.', 'Two dogs.']\"\n", {"a.jpg": ["A dog.", "Two dogs."]}),
    (
      'image\tcaption\na.jpg\t"[""One."", ""Two.""]"\nb.jpg\t"He said ""no"""\n',
      {"a.jpg": ["One.", "Two."], "b.jpg": ['He said "no"']},
    ),
    (
      'image,caption\na.jpg,"Hello there\nb.jpg,second\nc.jpg,He said "\n',
      {"a.jpg": ['"Hello there'], "b.jpg": ["second"], "c.jpg": ['He said "']},
    ),
    ('image,caption\na.jpg,"two\nlines"\n', {"a.jpg": ["two\nlines"]}),
  ],
)
def test_what_spreadsheets_and_pandas_write_is_read(tmp_path, text, expected):
  (tmp_path / "captions.csv").write_text(text)
  assert read_captions(tmp_path / "captions.csv") == expected


def test_flickr30k_as_it_is_published_and_on_the_hub(tmp_path):
  path = tmp_path / "results.csv"
  # One line of the file that is published lacks a separator.
  path.write_text("image_name| comment_number| comment\na.jpg| 0| A man , ok .\na.jpg| 1   Two.\n")
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
  two = [{"filepath": f, "filename": "a.png", "sentences": [{"raw": f}]} for f in ("train2014", "val2014")]
  (tmp_path / "k.json").write_text(json.dumps({"images": two}))
  assert read_captions(tmp_path / "k.json") == {f"{f}/a.png": [f] for f in ("train2014", "val2014")}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (COCO | {"annotations": [{"image_id": 9, "caption": "x"}]}, "an annotation is of the image 9, which is not listed"),
    ({"a.png": [None]}, "a caption is None, and no text"),
    ({"images": [{"filename": "a.png"}]}, "an image has filename, and none of captions"),
    ({"images": [{"id": 1}], "annotations": []}, "nothing is called 'file_name'"),
    ({"images": [{"id": i, "file_name": "a.jpg"} for i in (1, 2)], "annotations": []}, "two images are called 'a.jpg'"),
  ],
)
def test_json_of_no_known_form_says_why(tmp_path, value, message):
  (tmp_path / "k.json").write_text(json.dumps(value))
  with pytest.raises(ValueError, match=message):
    read_captions(tmp_path / "k.json")


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


def test_a_caption_of_a_test_image_is_no_part_of_the_training_data(tmp_path):
  np.savez(tmp_path / "all.npz", images=np.zeros((4, 8, 8), np.uint8), split=np.array([0, 0, 2, 2]))
  own = {"channels": 1, "mean": (0.5,), "std": (0.5,), "captions": CaptionConfig(train="captions.json")}
  cfg = DataConfig(source="npz", root=str(tmp_path), canvas_px=8, train="all.npz:0", test="all.npz:2", **own)
  prints = []
  for text in ("four", "another four"):
    (tmp_path / "captions.json").write_text(json.dumps([["one"], ["two"], ["three"], [text]]))
    prints.append([open_source(cfg, split).fingerprint() for split in ("train", "test")])
  assert prints[0][0] == prints[1][0] and prints[0][1] != prints[1][1]


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


def test_images_without_a_caption_are_refused_or_left_out(folder, caplog):
  (folder / "captions.csv").write_text(CSV.replace("b.png", "other.png"))
  with pytest.raises(ValueError, match=r"no captions of 1 of 3 images, such as train/pets/b\.png.*uncaptioned=drop"):
    open_images(config(folder), "train")
  assert len(open_images(config(folder, uncaptioned="drop"), "train")) == 2
  assert "no captions of 1 of 3 images, such as train/pets/b.png: they are left out" in caplog.text


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("image,caption\na.png,\n", r"a caption of train/pets/a\.png is empty"),
    ("image,caption\nx.png,one\n", r"names other images \(x\.png\) than there are"),
    ("a.png\n", "line 1 has 1 cells of 2"),
    ("image,caption,split\na.png,one\n", "line 2 has 2 cells of 3"),
    ("image,caption,split\na.png,3 dogs sit\n", "line 2 has 2 cells of 3"),
    ("image,caption\na.png,&nbsp;\n", r"a caption of train/pets/a\.png is empty"),
    ("photo,caption\na.png,one\n", "the columns are photo, caption, and none of file_name, "),
    ("image,words\na.png,one\n", "the columns are image, words, and none of captions, "),
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


# ------------------------------------------------------------------------------------------------ TFDS
TFDS = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

class TinyCaptions(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    text = tfds.features.Text()
    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "caption": text, "title": {"en": text, "de": text}}
    features["captions"] = tfds.features.Sequence({"id": np.int64, "text": text})
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, _):
    return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

  def _generate_examples(self, num):
    for i in range(num):
      captions = [{"id": j, "text": f"picture {i} {j}"} for j in range(0 if i == 2 else 2)]
      text = "" if i == 1 else f"picture {i}"
      own = {"caption": text, "captions": captions, "title": {"en": "one", "de": "eins"}}
      buffer = io.BytesIO()
      Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(buffer, "PNG")
      yield str(i), {"image": buffer.getvalue()} | own

TinyCaptions(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  run_python(TFDS, str(folder))
  return folder


def tfds_config(folder, key, **captions):
  captions = CaptionConfig(**({"train": key, "per_image": 2, "length": 12, "vocab_size": 300} | captions))
  return DataConfig("tfds", 8, root=str(folder), name="tiny_captions", label_key="", captions=captions)


@pytest.mark.parametrize(("key", "lacks", "counts"), [("captions/text", 2, 2), ("caption", 1, 1), ("title/en", 9, 1)])
def test_a_text_feature_of_tfds_is_read_and_who_has_none_is_left_out_before_training(tfds_dir, key, lacks, counts):
  if lacks < 4:
    with pytest.raises(ValueError, match="no captions of 1 of 4 images, such as number"):
      open_images(tfds_config(tfds_dir, key), "train")
  images = open_images(tfds_config(tfds_dir, key, uncaptioned="drop"), "train")
  rows = images.read(np.arange(len(images)))
  assert sorted(int(canvas[0, 0, 0]) for canvas in rows["canvas"]) == [i for i in range(4) if i != lacks]
  assert ((rows["caption"][:, :, 0] >= 0).sum(1) == counts).all()
  if lacks < 4:
    with pytest.raises(ValueError, match="no image has more than"):
      images.check_captions(3)


@pytest.mark.parametrize(
  ("key", "message"),
  [
    ("words", "data.captions.train is 'words', but tiny_captions has caption, captions, image, title"),
    ("image", r"is no text in tiny_captions, but Image \(8, 8, 3\)"),
    ("captions", "holds id, text in tiny_captions: give one of them, captions/"),
    ("captions/id", "is no text in tiny_captions"),
    ("captions/words", "leads nowhere in tiny_captions: it has id, text"),
    ("caption/en", "leads nowhere in tiny_captions: it has Text"),
  ],
)
def test_a_feature_that_is_no_text_is_named(tfds_dir, key, message):
  with pytest.raises(ValueError, match=message):
    open_images(tfds_config(tfds_dir, key), "train")
