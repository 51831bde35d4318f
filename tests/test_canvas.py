"""One image on its canvas: how large it is kept, what is cut, and that every kind of picture becomes one."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from jepa_jax.data import DataConfig, open_images
from jepa_jax.data.decode import Fit, decode_image
from jepa_jax.views import Pixels, center_view
from tests.images import encode, flat_image


def whole(px: int) -> Fit:
  return Fit(px, px, whole=True)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (400, 100), (100, 400), (2000, 1000), (1, 900)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_the_canvas_keeps_the_aspect_and_small_images_their_size(height, width, image_format):
  image = decode_image(encode(flat_image(100, height, width), image_format), whole(64), 3)
  scale = min(1.0, 64 / max(height, width))
  assert abs(image.shape[0] - height * scale) <= 0.5 or image.shape[0] == 1
  assert abs(image.shape[1] - width * scale) <= 0.5 or image.shape[1] == 1
  assert image.dtype == np.uint8 and np.abs(image.astype(int) - 100).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "array"])
@pytest.mark.parametrize(
  ("size", "kept"),  # (height, width): the shorter side becomes 48, the longer at most 64, smaller ones stay
  [((375, 500), (48, 64)), ((500, 375), (64, 48)), ((300, 900), (48, 64)), ((96, 96), (48, 48)), ((40, 60), (40, 60))]
  + [((20, 90), (20, 64)), ((48, 64), (48, 64))],
)
def test_the_shorter_side_is_scaled_and_the_longer_cut(size, kept, kind):
  image = flat_image(100, *size)
  assert decode_image(image if kind == "array" else encode(image, kind), Fit(48, 64), 3).shape == (*kept, 3)


def test_what_is_cut_is_as_much_at_both_ends():
  ramp = np.broadcast_to(np.arange(300) * 255 // 299, (100, 300)).astype(np.uint8)
  image = decode_image(encode(ramp), Fit(50, 100), 1)[25, :, 0].astype(float)
  assert image.shape == (100,) and image[:2].mean() + image[-2:].mean() == pytest.approx(255, abs=3)
  assert image[0] == pytest.approx(255 / 6, abs=3)


@pytest.mark.parametrize(("photo", "most"), [("china.jpg", 6), ("flower.jpg", 3)])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (1200, 1600)])
def test_the_evaluation_view_is_the_usual_256_to_224_of_pillow(size, photo, most):
  """The shorter side to 256 px and the central 224: what published accuracies were measured with."""
  picture = ImageOps.fit(Image.fromarray(load_sample_image(photo)), size[::-1], Image.Resampling.BICUBIC)
  data = encode(np.asarray(picture), "JPEG", quality=95)
  with Image.open(io.BytesIO(data)) as picture:
    side = 224 / 256 * min(size)
    left, top = ((length - side) / 2 for length in picture.size)
    box = (left, top, left + side, top + side)  # in one resize, lest the crop move by half a pixel where it is odd
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR, box=box), float)

  def difference(fit: Fit) -> float:
    """Root mean square in grey levels."""
    canvas, image = np.zeros((1, 341, 341, 3), np.uint8), decode_image(data, fit, 3)
    canvas[0, : image.shape[0], : image.shape[1]] = image
    batch = {"canvas": canvas, "height": np.array([image.shape[0]]), "width": np.array([image.shape[1]])}
    view = 255 * np.asarray(center_view(batch, 224, Pixels((0.0,) * 3, (1.0,) * 3), 0.875))[0]
    return np.sqrt(np.mean((view - expected) ** 2))

  assert difference(Fit(256, 341)) < most
  assert difference(whole(256)) > 1.2 * difference(Fit(256, 341))  # with the longer side at 256 px


def test_what_lies_outside_the_image_is_black_and_its_size_is_told(tmp_path):
  np.savez(tmp_path / "train.npz", images=np.full((3, 5, 9), 7, np.uint8), labels=[0, 1, 0])
  rows = open_images(DataConfig("npz", 12, root=str(tmp_path)), "train").read(np.arange(3))
  assert rows["canvas"].shape == (3, 12, 12, 3)
  assert (rows["height"] == 5).all() and (rows["width"] == 9).all()
  assert (rows["canvas"][:, :5, :9] == 7).all() and rows["canvas"].sum() == 3 * 5 * 9 * 3 * 7


def test_large_images_are_antialiased():
  stripes = np.zeros((512, 512, 3), np.uint8)
  stripes[:, ::2] = 255
  for data in (encode(stripes), stripes):
    image = decode_image(data, whole(64), 3)
    assert np.abs(image[4:-4, 4:-4].astype(int) - 127).max() <= 3


def test_every_kind_of_picture_becomes_the_channels_asked_for():
  red = flat_image(0)
  red[..., 0] = 200
  palette = Image.fromarray(red).quantize(4)
  kinds = {
    "grey": (encode(np.full((8, 8), 90, np.uint8)), (90, 90, 90)),
    "grey, 16 bit": (encode(np.full((8, 8), 90 * 256, np.uint16)), (90, 90, 90)),
    "palette": (encode(palette), (200, 0, 0)),
    "palette, transparent": (encode(palette, transparency=b"\x80\x10"), (200, 0, 0)),
    "RGBA": (encode(np.dstack([red, np.full((8, 8), 128, np.uint8)])), (200, 0, 0)),
    "CMYK": (encode(Image.new("CMYK", (8, 8)), "JPEG"), (255, 255, 255)),
    "WebP": (encode(red, "WEBP", lossless=True), (200, 0, 0)),
    "array": (np.full((8, 8, 1), 90, np.uint8), (90, 90, 90)),
  }
  for kind, (data, colour) in kinds.items():
    np.testing.assert_array_equal(decode_image(data, whole(8), 3)[4, 4], colour, err_msg=kind)
    assert decode_image(data, whole(8), 1).shape == (8, 8, 1), kind
  assert decode_image(red, whole(8), 1)[0, 0, 0] == round(0.299 * 200)


def test_exif_orientation_is_applied():
  half = np.zeros((16, 32, 3), np.uint8)
  half[:, :16] = 255  # the left half is white
  exif = Image.Exif()
  exif[0x0112] = 6  # stored on its side: turn clockwise to show
  for canvas_px in (32, 16):
    image = decode_image(encode(half, "JPEG", exif=exif, quality=95), whole(canvas_px), 3)
    assert image.shape == (canvas_px, canvas_px // 2, 3)
    assert image[: canvas_px // 2 - 2].min() > 240 and image[canvas_px // 2 + 2 :].max() < 15


@pytest.mark.parametrize("by", [1.1, 1.3, 1.49])
@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_a_small_resize_is_as_near_to_lanczos_as_pillows_bilinear(photo, by):
  """What OpenCV's quicker resize, which is not antialiased, is allowed to cost."""
  picture = Image.fromarray(load_sample_image(photo))
  target = (round(picture.width / by), round(picture.height / by))
  lanczos = np.asarray(picture.resize(target, Image.Resampling.LANCZOS), float)
  error = lambda pixels: np.sqrt(np.mean((np.asarray(pixels, float) - lanczos) ** 2))
  ours = decode_image(np.asarray(picture), Fit(min(target), max(target)), 3)
  assert error(ours) < 1.1 * error(picture.resize(target, Image.Resampling.BILINEAR))
