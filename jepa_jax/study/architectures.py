"""Does one setting train any architecture? LeJEPA, nothing tuned, on nine networks, beside each trained with labels.

The paper (arXiv 2511.08544) trains some sixty networks with one hyper-parameter. What a network can learn here at all
is told by the same network trained with labels on the same views for the same time, and by the same probes; what it
knows without learning, by its random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_jax.data import open_images
from jepa_jax.study import figures, trials
from jepa_jax.study.tables import Result, chosen, markdown, with_spread
from jepa_jax.study.variants import Variant, run_folder
from jepa_jax.telemetry import read_metrics

DESCRIPTION = "LeJEPA, nothing tuned, on MLP to ViT, beside labels and random weights on each. Resumable."
SUPERVISED, RANDOM = ", supervised", ", random weights"
PANELS = {"loss": "loss", "feature_std": "feature std", "probe_accuracy": "online probe, %"}


def _vit(**changes: object) -> dict[str, str]:
  size = {"name": "vit", "patch_size": 4, "width": 96, "depth": 4, "num_heads": 3, "mlp_dim": 0, "probe_layers": 1}
  size |= {"cls_token": False, "pool": "mean", "num_registers": 0, "drop_path": 0.0, "pos_embed": "learned"}
  size |= {"init": "fan_in"}  # all of it: a config's own ViT may have other settings
  return {f"encoder.{key}": str(value) for key, value in (size | changes).items()}


def _resnet(variant: str, width: int) -> dict[str, str]:
  values = {"name": "resnet", "variant": variant, "stem": "cifar", "width": width}
  return {f"encoder.{key}": str(value) for key, value in values.items()}


_MIXER = {"name": "mixer", "patch_size": 4, "width": 96, "depth": 4, "token_dim": 48, "channel_dim": 384}
ENCODERS: dict[str, dict[str, str]] = {
  "MLP": {"encoder.name": "mlp", "encoder.widths": "(512, 512, 256)"},
  "ConvNet": {"encoder.name": "convnet", "encoder.widths": "(32, 64, 128, 256)"},
  "ResNet-18, width 16": _resnet("18", 16),
  "ResNet-50, width 8": _resnet("50", 8),
  "ViT, mean pool": _vit(),
  "ViT, from .02": _vit(init="normal"),
  "ViT, class token": _vit(cls_token=True, pool="cls"),
  "ViT, 4 registers": _vit(num_registers=4),
  "MLP-Mixer": {f"encoder.{key}": str(value) for key, value in _MIXER.items()},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`; settings that all runs share follow as --config.key=value."""
  trials.add_arguments(parser, list(ENCODERS))


def run(
  config: str,
  workdir: str,
  only: str | None = None,
  seeds: Sequence[int] = (0, 1),
  dry_run: bool = False,
  overrides: Mapping[str, str] | None = None,
) -> dict:
  """Returns the table and the results; writes architectures.csv, .md and .png, relative.md and curves.png.

  Every network reads the size of the config's global views, in training and in evaluation.
  """
  if given := [key for key in overrides or {} if key.startswith("encoder.")]:
    raise ValueError(f"leave out --config.{given[0]}: the encoders of this study are its own ({', '.join(ENCODERS)})")
  base, names = trials.load_lejepa(config, overrides), chosen(only, list(ENCODERS))
  num_classes = trials.labelled(open_images(base.data, "train"))
  size_px = base.objective.views.global_crops.size_px
  common, own = trials.shared_by_supervised(overrides)
  variants = []
  for name in names:
    encoder = ENCODERS[name] | {"encoder.image_size": str(size_px)}
    variants.append(Variant(name, tuple((own | encoder).items())))
    variants.append(Variant(name + SUPERVISED, tuple((encoder | trials.supervised(num_classes)).items())))
    variants.append(Variant(name + RANDOM, tuple((encoder | trials.UNTRAINED).items())))
  result = trials.run_trials("architectures", config, workdir, variants, seeds, common, dry_run, {})
  if dry_run:
    return result
  folder = Path(workdir).expanduser()
  shares = relative(result["results"])
  (folder / "relative.md").write_text(shares + "\n")
  curves = {n: [read_metrics(run_folder(folder, Variant(n), seed)) for seed in seeds] for n in names}
  figures.draw_runs(folder / "curves.png", curves, PANELS)
  return result | {"table": f"{result['table']}\n\n{shares}"}


render = trials.render


def relative(results: Sequence[Result]) -> str:
  """Returns a Markdown table of linear probes on each network's features, the mean of the seeds, in %.

  The gain is that over random weights, as a share of what labels gain.
  """
  scores = lambda name, column: np.array([r.score(column) for r in results if r.variant == name])
  rows = []
  for name in dict.fromkeys(r.variant for r in results if not r.variant.endswith((SUPERVISED, RANDOM))):
    random, own, labels = (scores(name + arm, "linear") for arm in (RANDOM, "", SUPERVISED))
    share = f"{100 * (own.mean() - random.mean()) / (labels.mean() - random.mean()):.0f}"
    rows.append([name, *map(with_spread, (random, own, labels)), share])
  return markdown(["network", "random weights", "LeJEPA", "with labels", "gain over that of labels, %"], rows)
