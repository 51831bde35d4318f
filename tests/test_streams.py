"""Named streams of random numbers: what an example draws for one purpose says nothing of what it draws for another."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import jepa_jax
from jepa_jax import views
from jepa_jax.models import PredictorConfig, ViTConfig
from jepa_jax.objectives import make_objective
from jepa_jax.objectives.ijepa import IJEPAConfig
from jepa_jax.step import step_keys
from jepa_jax.streams import stream
from jepa_jax.views.paired import sample_pair

NUM_STEPS, NUM_ROWS, NUM_VIEWS = 201, 4, 4
# What is drawn below a key, by name (`stream`) or numbered (`fold_in`, or `split`, which gives the same keys).
EXAMPLE = {
  "crops": {NUM_VIEWS: {}},
  "colors": {NUM_VIEWS: {}, "target": {}, "source": {}},
  "masks": {},
  "bank": {NUM_VIEWS: {}},
  "sources": {},
  "captions": {},
}
STEP = {
  "views": {NUM_ROWS: EXAMPLE},
  "networks": {NUM_ROWS: {f"views {group}": {NUM_VIEWS: {}} for group in range(2)} | {"text": {NUM_VIEWS: {}}}},
  "loss": {},
}
RUN = {
  "init": {
    "views": {NUM_ROWS: EXAMPLE},
    "encoder": {},
    "projector": {},
    "predictor": {},
    "text": {},
    "prototypes": {},
    "patches": {},
  },
  "lora": {name: {NUM_ROWS: {}} for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/gate", "mlp/fc2")},
  "step": {NUM_STEPS: STEP},
  "held out": {NUM_ROWS: {"step": {NUM_ROWS: STEP}}},
  # Evaluations and pictures begin with a seed of their own, which may be that of the run.
  "images": {NUM_ROWS: EXAMPLE},
  "heads": {NUM_VIEWS: {}},
  "predictor": {},
  "tuning": {NUM_ROWS: EXAMPLE},
  "mixup": {NUM_ROWS: {}},
  "task tokens": {},
  "dropout": {NUM_ROWS: EXAMPLE},
  "crops": {NUM_ROWS: EXAMPLE},
}


# ------------------------------------------------------------------------------------------------------- independence
@pytest.fixture(scope="module", params=["official", "uniform"])
def drawn(request):
  """Block sizes (B, 8), and what else is drawn for each of 2,000 examples of one step (B, ...)."""
  color = views.ColorSettings(0.4, 0.4, 0.2, 0.1, p=1.0)
  crops = views.CropSettings(num=1, size_px=224, scale=(0.3, 1.0))
  cfg = IJEPAConfig(
    views.MultiCropSettings(crops, color=color), views.MaskSettings(request.param), PredictorConfig(depth=1, width=12)
  )
  encoder = ViTConfig(variant="tiny", patch_size=16, depth=2)
  objective = make_objective(cfg, encoder, views.Pixels((0.5,) * 3, (0.5,) * 3))

  def draw(key):
    masks = objective.masks(key[None])
    row, column = (x[0] for x in jnp.divmod(masks.targets_BxMxT, objective.grid_hw[1]))
    sizes = [jnp.ptp(places_MxT, axis=1) for places_MxT in (row, column)]
    params = views.sample_views(key, 256, 256, cfg.views)[0]
    paired = sample_pair(stream(key, "colors"), color, color)
    return jnp.concatenate(sizes), params, paired

  keys_B = views.example_keys(step_keys(jax.random.key(0), 7).views, jnp.arange(2000))
  return jax.device_get(jax.jit(jax.vmap(draw))(keys_B))


def assert_uncorrelated(sizes_BxM, numbers_B, what):
  for sizes_B in sizes_BxM.T:
    assert abs(spearmanr(sizes_B, np.ravel(numbers_B)).statistic) < 0.1, what


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_block_sizes_say_nothing_of_the_colours(drawn, name):
  """Numbered by hand, masks and jitter began with the same bits: heights and brightness had a correlation of .926."""
  sizes_BxM, params, paired = drawn
  assert sizes_BxM.std(axis=0).min() > 0.3
  for color in (params.color, *paired):
    assert getattr(color, name).std() > 0.05
    assert_uncorrelated(sizes_BxM, getattr(color, name), name)


@pytest.mark.parametrize("name", ["top", "left", "height", "width"])
def test_block_sizes_say_nothing_of_the_crop(drawn, name):
  sizes_BxM, params, _ = drawn
  assert_uncorrelated(sizes_BxM, getattr(params.crop, name), name)


def test_pairs_of_colours_are_drawn_apart(drawn):
  target, source = drawn[2]
  for name in ("brightness", "contrast", "saturation", "hue"):
    assert_uncorrelated(getattr(target, name)[:, None], getattr(source, name), name)


# ------------------------------------------------------------------------------------------------------------ distinct
def keys_below(key, tree):
  """Returns the raw data (number of keys, words) of this key and of all that are drawn below it."""
  found = [jax.random.key_data(key)[None]]
  for name, subtree in tree.items():
    if isinstance(name, int):
      keys = views.example_keys(key, jnp.arange(name))
      below = jax.vmap(lambda key, subtree=subtree: keys_below(key, subtree))(keys)
      found.append(below.reshape(-1, below.shape[-1]))
    else:
      found.append(keys_below(stream(key, name), subtree))
  return jnp.concatenate(found)


def test_no_two_streams_of_an_example_a_step_and_a_run_are_equal():
  data = np.asarray(jax.jit(lambda key: keys_below(key, RUN))(jax.random.key(0)))
  assert len(data) > NUM_STEPS * NUM_ROWS * 20
  assert len(np.unique(data, axis=0)) == len(data)


def test_what_is_split_off_is_numbered():
  """Why purposes have names: below one key, numbers and splits are the same keys."""
  key = jax.random.key(3)
  same = lambda a, b: np.array_equal(jax.random.key_data(a), jax.random.key_data(b))
  assert same(jax.random.split(key, 5), views.example_keys(key, jnp.arange(5)))
  step = jax.random.fold_in(stream(key, "step"), 5)
  assert all(same(found, stream(step, name)) for name, found in step_keys(key, 5)._asdict().items())
  assert same(views.view_keys(key[None], 1, 3)[0], jax.random.split(stream(key, "views 1"), 3))


def names_in(tree):
  return {name for name in tree if isinstance(name, str)}.union(*(names_in(below) for below in tree.values()))


def names_in_the_code():
  """Names that are given to `stream` as words, on the spot or in the sequence that a comprehension walks over."""
  is_stream = lambda node: isinstance(node, ast.Call) and getattr(node.func, "id", "") == "stream"
  found = set()
  for path in Path(jepa_jax.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if is_stream(node):
        found |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
      elif isinstance(node, ast.GeneratorExp | ast.ListComp) and any(map(is_stream, ast.walk(node.elt))):
        words = (word for part in node.generators for word in ast.walk(part.iter) if isinstance(word, ast.Constant))
        found |= {word.value for word in words if isinstance(word.value, str)}
  return found


def test_every_stream_of_the_code_stands_in_the_tree_above():
  named = names_in_the_code()
  assert {"step", "masks", "crops", "task tokens"} <= named
  assert named <= names_in(RUN)
