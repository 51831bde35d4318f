"""What an image world model knows: the pictures nearest to what its predictor imagines after each action on colours.

For each image there is one bank of pictures, and a question is a pair of its rows: the source that is looked at, and
the picture that the action asks for.

Legend: B images, K pictures of an image's bank, Q questions, R sources, S values of a dimension, M nearest pictures,
N patches, D width, A numbers of an action, C H W image.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import losses
from jepa_jax.config import build_config, to_dict
from jepa_jax.data import open_images
from jepa_jax.evaluate import check_overrides
from jepa_jax.objectives import Imagines, Objective
from jepa_jax.runs import open_run
from jepa_jax.show import held_out
from jepa_jax.show.held_out import batches, rank_numbers, rounded
from jepa_jax.show.world_model_picture import Case, Drawn, Sweep, draw
from jepa_jax.streams import stream
from jepa_jax.views import (
  ACTIONS,
  PAPER_JITTER,
  ColorParams,
  action,
  apply_color,
  center_view,
  has_actions,
  no_color,
  sample_color,
  undo_scale,
)

DESCRIPTION = "What an IWM imagines after each action on colours: sweeps, and grayscale, blur, solarise undone."
MEASURED = 32  # images that the numbers are over; the first of them are drawn
NUM_JITTERS, NUM_NEAREST, CHUNK = 256, 8, 64
LEAST_CHROMA = 0.03  # mean range over an image's channels; below, it is grey
DIMENSIONS = ("brightness", "contrast", "saturation", "hue")
UNDONE = {"grayscale": {"grayscale": True}, "blur": {"blur_sigma": 2.0}, "solarize": {"solarize": True}}
NEEDS_COLOR = ("saturation", "hue", "grayscale")  # on one channel they change nothing
# Colours that a grayscale image might have had, beyond the jitters: 8 hues in 4 saturations, less the image itself.
OTHER_COLORS = [{"hue": h / 8, "saturation": s} for h in range(8) for s in (0.5, 1.0, 1.5, 2.0) if (h, s) != (0, 1.0)]
ANY_COLOR = dataclasses.replace(PAPER_JITTER, grayscale_p=1.0, blur_p=(1.0,), solarize_p=(1.0,))


def add_arguments(parser: Any) -> None:
  """Adds the arguments of `run` to an argparse parser; settings of data and evals follow as --config.data.key=value."""
  held_out.add_arguments(parser, images=2, seed="images and jitters", picture="world_model.png")
  parser.add_argument(
    "--steps-per-dimension", type=int, default=9, help="values of a sweep, an odd number (default: %(default)s)"
  )


def run(
  workdir: str | Path,
  step: int | None = None,
  images: int = 2,
  steps_per_dimension: int = 9,
  seed: int = 0,
  out: str | Path = "",
  overrides: dict[str, str] | None = None,
) -> dict[str, Any]:
  """Draws a PNG and returns its path and the numbers, for JSON: how well the picture asked for is found in the bank.

  Over 32 held-out images with colours, of which the first are drawn, by what is asked for: the image unchanged
  ("null"), one dimension changed ("sweeps", without their middle) and an operation undone ("undo"); see `rank_table`.
  ValueError where the checkpoint has no predictor that is told actions, there are too few images or odd sizes.
  """
  check_overrides(overrides)
  found_run = open_run(workdir, step)
  workdir, step, experiment = found_run.workdir, found_run.step, found_run.experiment()
  objective, cfg = experiment.objective, build_config(to_dict(experiment.cfg), overrides)
  check_world_model(objective, workdir)
  questions = ask(steps_per_dimension, cfg.data.channels)
  test = open_images(cfg.data, "test")
  path = held_out.picture_path(out, workdir / "world_model.png")
  if not 1 <= images <= len(test):
    raise ValueError(f"images={images}: give 1 to {len(test)}, the number of test images")

  explore_fn, found, drawn = make_explore_fn(objective, questions), [], []
  networks = found_run.networks(experiment)
  shown = colored_images(test, make_pixels_fn(objective, cfg), seed)
  for pixels_CxHxW, key in itertools.islice(shown, max(images, MEASURED)):
    found.append(jax.device_get(explore_fn(networks["params"], networks["target"], pixels_CxHxW, key)))
    if len(drawn) < images:
      drawn.append(illustrate(found[-1], questions, pixels_CxHxW))
  if len(drawn) < images:
    raise ValueError(f"images={images}, but only {len(drawn)} of {len(test)} test images have colours: ask for fewer")
  tables = rank_table(found, questions)
  about = f"{cfg.name}, step {step}. Mean reciprocal ranks over {len(found)} held-out images"
  by_name = tables["sweeps"] | {f"undo {name}": numbers for name, numbers in tables["undo"].items()}
  draw(path, drawn, about, by_name, questions.num_bank, unseen_actions(objective.cfg))
  counts = {"step": step, "images": len(found), "bank": questions.num_bank}
  return counts | tables | {"picture": str(path)}


def colored_images(images: Any, pixels_fn: Any, seed: int):
  """Yields (pixels (C, H, W), key) of images, in an order drawn with seed, grey ones left out.

  Undoing grayscale or turning the hue is no question there: all answers look the same.
  """
  for batch, keys_B, real_B in batches(images, np.random.default_rng(seed).permutation(len(images)), seed):
    pixels_BxCxHxW = pixels_fn(batch)
    for b in np.flatnonzero(real_B & np.asarray(has_colors(pixels_BxCxHxW))):
      yield pixels_BxCxHxW[b], keys_B[b]


def has_colors(pixels_BxCxHxW):
  """Returns which images have colours (B,), by the mean range over red, green and blue; all of other channels."""
  chroma_B = (pixels_BxCxHxW.max(1) - pixels_BxCxHxW.min(1)).mean((1, 2))
  return (chroma_B > LEAST_CHROMA) | (pixels_BxCxHxW.shape[1] != 3)


def check_world_model(objective: Objective, workdir: Path) -> None:
  """Raises a ValueError unless the objective has a predictor that is told actions."""
  if not isinstance(objective, Imagines):
    raise ValueError(
      f"{workdir} was trained with objective {objective.cfg.name!r}, which is told no actions: train one of "
      "configs/iwm_*.py"
    )
  if objective.cfg.predictor.conditioning == "none":
    raise ValueError(
      f"{workdir} was trained with predictor.conditioning='none': it imagines the same whatever the action, so "
      "there is nothing to draw; train with conditioning='feature' or 'sequence'"
    )


def unseen_actions(cfg: Any) -> set[str]:
  """Returns the names of the actions that are always zero in training with these settings of an IWM."""

  def is_seen(name):
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    off |= {"grayscale_p": 0.0, "blur_p": (0.0,), "solarize_p": (0.0,)}
    off.pop(name if name in off else f"{name}_p")
    return has_actions(*(dataclasses.replace(c, **off) for c in (cfg.views.color, cfg.source)), cfg.source_from)

  return {name for name in ACTIONS if not is_seen(name)}


@dataclasses.dataclass(frozen=True)
class Questions:
  """The bank's rows that are the same for every image, and what is asked.

  colors: what is done to the image in each of these rows, in the fields of ColorParams; row 0 is the image itself.
  names, middle: of each question: the dimension or the operation undone; whether the image itself is asked for though
    it is a sweep's (its null value).
  source_Q, truth_Q: rows of the bank. First the sweeps, S values each, then the operations undone.
  """

  colors: list[dict[str, float]]
  names: list[str]
  is_middle: np.ndarray
  source_Q: np.ndarray
  truth_Q: np.ndarray

  @property
  def num_bank(self) -> int:
    return len(self.colors) + NUM_JITTERS

  def of(self, name: str, middle: bool = True) -> np.ndarray:
    """Returns which questions are about a dimension or an operation, with or without the sweep's middle."""
    return np.flatnonzero((np.array(self.names) == name) & (middle | ~self.is_middle))


def ask(num_values: int, channels: int) -> Questions:
  """Returns the questions with sweeps of num_values, an odd number, over the paper's range of each dimension.

  Each picture is in the bank once, lest it has equals: all sweeps share their middle, the image itself. What is
  undone is in it, too, so that a predictor that leaves the source as it is has something to find.
  """
  if num_values < 3 or num_values % 2 == 0:
    raise ValueError(f"steps_per_dimension={num_values} must be odd, 3 or more: the middle is the image unchanged")
  half = num_values // 2
  colors, names, is_middle, source, truth = [{}], [], [], [], []
  for name in (d for d in DIMENSIONS if channels == 3 or d not in NEEDS_COLOR):
    for offset in np.arange(-half, half + 1) / half:
      truth.append(len(colors) if offset else 0)
      is_middle.append(offset == 0)
      if offset:
        colors.append({name: (name != "hue") + getattr(PAPER_JITTER, name) * offset})
    names += [name] * num_values
  source += [0] * len(truth)
  for name in (u for u in UNDONE if channels == 3 or u not in NEEDS_COLOR):
    names.append(name)
    is_middle.append(False)
    source.append(len(colors))
    truth.append(0)
    colors.append(UNDONE[name])
  colors += OTHER_COLORS if channels == 3 else []
  return Questions(colors, names, np.array(is_middle), np.array(source), np.array(truth))


def bank_colors(key, questions: Questions) -> ColorParams:
  """Returns what is done to an image for its bank, fields (K,): the questions' rows, then jitters drawn with key."""
  known = no_color((len(questions.colors),))
  for name in sorted(set().union(*questions.colors)):
    changed = {row: changes[name] for row, changes in enumerate(questions.colors) if name in changes}
    field = getattr(known, name).at[np.array(list(changed))].set(np.array(list(changed.values())))
    known = dataclasses.replace(known, **{name: field})
  jitters = jax.vmap(lambda k: sample_color(k, PAPER_JITTER))(jax.random.split(stream(key, "bank"), NUM_JITTERS))
  return jax.tree.map(lambda *x: jnp.concatenate(x), known, jitters)


@jax.jit
def recolor(pixels_CxHxW, colors_K: ColorParams):
  """Returns the pictures (K, C, H, W) of an image with these colours."""
  return jax.vmap(lambda colors: apply_color(pixels_CxHxW, colors, ANY_COLOR))(colors_K)


def make_pixels_fn(objective: Objective, cfg: Any):
  """Returns the jitted batch -> evaluation views (B, C, H, W), in [0, 1]."""
  crop = cfg.objective.views.global_crops.size_hw, objective.pixels, cfg.evals.crop_fraction, objective.interpolation
  return jax.jit(lambda batch: objective.to_pixels(center_view(batch, *crop)))


def make_explore_fn(objective: Objective, questions: Questions):
  """Returns the jitted (params, target, pixels_CxHxW, key) -> answers of one image.

  inverse_rank_Q: 1 / rank of the picture asked for by its tokens' distance from those imagined; inverse_rank_null_Q:
  the same with the null action in place of the action; nearest_QxM: the nearest rows of the bank; action_QxA;
  colors_K: what was done to the image for its bank.
  """
  sources, which_Q = np.unique(questions.source_Q, return_inverse=True)
  truth_Q = jnp.asarray(questions.truth_Q)

  @jax.jit
  def explore(params, target, pixels_CxHxW, key):
    online, average = params["encoder"], (target or params)["encoder"]
    colors_K = bank_colors(key, questions)
    rows = lambda at: jax.tree.map(lambda x: x[at], colors_K)

    def imagine(asked):
      which, action_A = asked
      return objective.imagine(params, context_RxNxD[which], action_A[None])[0]

    bank_KxNxD = objective.encode_bank(average, pixels_CxHxW, colors_K, ANY_COLOR, CHUNK)
    context_RxNxD = objective.encode_pixels(online, recolor(pixels_CxHxW, rows(sources)))
    actions_QxA = action(rows(questions.source_Q), rows(questions.truth_Q))
    null_RxA = jnp.zeros((len(sources), actions_QxA.shape[1]))
    asked = jnp.concatenate([which_Q, np.arange(len(sources))]), jnp.concatenate([actions_QxA, null_RxA])
    imagined = jax.lax.map(imagine, asked, batch_size=CHUNK)
    distance = losses.distances(imagined, bank_KxNxD, jnp.ones(objective.num_patches))
    distance_QxK, null_QxK = distance[: len(which_Q)], distance[len(which_Q) :][which_Q]
    return {
      "inverse_rank_Q": losses.reciprocal_ranks(distance_QxK, truth_Q),
      "inverse_rank_null_Q": losses.reciprocal_ranks(null_QxK, truth_Q),
      "nearest_QxM": jax.lax.top_k(-distance_QxK, NUM_NEAREST)[1],
      "action_QxA": actions_QxA,
      "colors_K": colors_K,
    }

  return explore


def rank_table(found: list[dict[str, np.ndarray]], questions: Questions) -> dict[str, Any]:
  """Returns the numbers of "null", "sweeps" and "undo": mean reciprocal rank, median rank, top 1 and 10 in percent.

  Beside them chance, that is a guess among the bank, and "mrr_null_action": what the same predictor has without being
  told what to do. It is more than chance where what is asked for is near to the source.
  """

  def numbers(which):
    inverse, null = (np.stack([x[f"inverse_rank_{name}Q"][which] for x in found]) for name in ("", "null_"))
    mrr = {"mrr": inverse.mean(), "mrr_null_action": null.mean(), "mrr_chance": losses.blind_mrr(questions.num_bank)}
    return {name: rounded(x) for name, x in mrr.items()} | rank_numbers(to_rank(inverse), questions.num_bank)

  sweeps = [name for name in dict.fromkeys(questions.names) if name in DIMENSIONS]
  return {
    "null": numbers(np.flatnonzero(questions.is_middle)[:1]),
    "sweeps": {name: numbers(questions.of(name, middle=False)) for name in sweeps},
    "undo": {name: numbers(questions.of(name)) for name in UNDONE if name in questions.names},
  }


def to_rank(inverse_rank: np.ndarray) -> np.ndarray:
  """Returns ranks, to the half that a tie counts, from their reciprocals."""
  return np.round(2 / inverse_rank) / 2


def illustrate(found: dict[str, Any], questions: Questions, pixels_CxHxW) -> Drawn:
  """Returns the pictures of one image's answers: all sweeps, and the nearest of the darkest and of all undone."""
  rank_Q, nearest_QxM, truth_Q = to_rank(found["inverse_rank_Q"]), found["nearest_QxM"], questions.truth_Q
  bank_KxHxWxC = np.moveaxis(np.asarray(recolor(pixels_CxHxW, found["colors_K"])), 1, -1).clip(0, 1)
  bank = np.broadcast_to(bank_KxHxWxC, (*bank_KxHxWxC.shape[:3], 3))  # one channel becomes grey

  def case(name, q, told):
    source, asked, nearest_M = bank[questions.source_Q[q]], bank[truth_Q[q]], nearest_QxM[q]
    return Case(name, told, source, asked, bank[nearest_M], nearest_M == truth_Q[q], rank_Q[q])

  sweeps, cases = [], []
  for name in dict.fromkeys(questions.names):
    which = questions.of(name)
    if name in DIMENSIONS:
      values = [undo_scale(found["action_QxA"][q])[name] for q in which]
      labels = [f"{360 * x:+.0f}°" if name == "hue" else f"× {x:.2f}" for x in values]
      sweeps.append(Sweep(name, labels, bank[truth_Q[which]], bank[nearest_QxM[which, 0]], rank_Q[which]))
      if name == "brightness":
        cases.append(case(name, which[0], f"brightness {labels[0]}"))
    else:
      cases.append(case(name, which[0], f"undo {name}"))
  return Drawn(sweeps, cases)
