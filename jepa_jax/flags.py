"""The flags of `train` and `eval`, and what their --help says."""

from __future__ import annotations

import argparse

TRAIN_HELP = """
Any setting of the config can be changed by its dotted name, for example
  python -m jepa_jax train --config=configs/lejepa_digits.py --workdir=workdirs/digits \\
      --config.optim.lr=1e-3 --config.total=20ep --config.mesh.fsdp=2
Durations take units: "100ep" (epochs), "5000steps", "2%". Run again, it resumes from the newest checkpoint.
The workdir then holds: checkpoints/, config.json, metrics.jsonl, goodput.json, tensorboard/, views.png, curves.png, and
complete.json once the run has ended.

Several processes (one per host, the same command on each): --distributed finds out the rest on Cloud TPU, SLURM and
GKE; elsewhere give --coordinator, --num-processes and --process-id. The workdir must be one folder for all of them.

Exit status: 0 done; 2 input that cannot work; 3 the loss is not finite; 74 storage failed: images that are
there could not be read, or one of several processes could not save; 75 stopped by SIGTERM after saving; 76 another
process was lost or never came. After 74, 75, 76 or a kill the same command goes on from the newest checkpoint.

Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR, by default ~/.cache/jepa_jax/compiled. On Linux the command
starts itself again with huge pages for the allocator (GLIBC_TUNABLES=glibc.malloc.hugetlb=1); JEPA_KEEP_MALLOC=1: not.
"""

EVAL_HELP = """
The table has a row for raw pixels, one for the random-initialised encoder (--no-baselines leaves both out) and one for
the checkpoint; it is also written to <workdir>/evals/<step>.json. What is finished is kept in <workdir>/evals/rows: a
killed evaluation goes on, and the baselines are computed once for all checkpoints; --again computes all anew. The
probes select on a held-out part of the training images, never on the test set. --evals takes
{protocols}
by default {default}. Each has its settings under its name, config.evals.knn.k;
config.evals.memory_gb bounds what probes hold of the features. All local devices make features; with --distributed
those of all hosts do. Data and protocols can be changed:
  python -m jepa_jax eval --workdir=workdirs/digits --evals=knn --config.evals.knn.k=5
  python -m jepa_jax eval --workdir=workdirs/imagenet --config.data.root=/mnt/disks/data
  python -m jepa_jax eval --workdir=workdirs/iwm --evals=predictor_tuning --config.evals.tuning.epochs=20
  python -m jepa_jax eval --weights=dinov2.pth --config.data.source=folder --config.data.root=pictures
  python -m jepa_jax eval --workdir=workdirs/digits --follow      # every checkpoint once, as they come
"""


IGNORED = "names of arrays that may stay unused: 'head.*,fc_norm.*'"


def add_train(train: argparse.ArgumentParser) -> None:
  train.add_argument(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="a Python file with get_config(), or the name of one that comes with the project (`configs` lists them); "
    "VARIANT is handed to it, e.g. lejepa_imagenet:vitl",
  )
  train.add_argument("--workdir", metavar="DIR", help="where everything is written; one run per folder")
  train.add_argument("--accept-config-change", action="store_true", help="resume although the config differs")
  train.add_argument(
    "--print-config", action="store_true", help="print the full config as JSON, defaults included, and stop"
  )
  train.add_argument(
    "--init-from",
    default="",
    metavar="WORKDIR[:STEP]",
    help="start from another run's networks, from imported weights, or from weights:FILE_OR_FOLDER_OR_HUB_ID",
  )
  train.add_argument(
    "--init-what",
    default="encoder",
    metavar="NAMES",
    help="which: encoder (default), everything, or names, with commas",
  )
  train.add_argument("--item", default="", help="with --init-from=weights: which network of several in the file")
  train.add_argument("--ignore", default="", metavar="A,B", help=f"with --init-from=weights: {IGNORED}")
  train.add_argument(
    "--profile", nargs="?", const="10:14", metavar="A:B", help="trace steps A to B of this start (default: 10:14)"
  )
  _add_several(train, "--timeout-s")  # as it was called up to version 0.3


def add_eval(evaluate: argparse.ArgumentParser) -> None:
  evaluate.add_argument("--workdir", metavar="DIR", help="the workdir of a run, or one checkpoint folder in it")
  help_ = "or published weights: they are imported into --workdir (default: workdirs/NAME), and evaluated there"
  evaluate.add_argument("--weights", metavar="FILE_OR_FOLDER_OR_HUB_ID", help=help_)
  evaluate.add_argument("--item", default="", help="with --weights: which network of several in the file")
  evaluate.add_argument("--ignore", default="", metavar="A,B", help=f"with --weights: {IGNORED}")
  evaluate.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
  evaluate.add_argument("--evals", metavar="NAMES", help="protocols, with commas between (default: the config's)")
  evaluate.add_argument("--no-baselines", action="store_true", help="leave out raw pixels and the random encoder")
  evaluate.add_argument("--again", action="store_true", help="compute also what an earlier evaluation has finished")
  evaluate.add_argument(
    "--follow", action="store_true", help="evaluate every checkpoint once, as they come, until the run has ended"
  )
  evaluate.add_argument("--poll-s", type=float, help="with --follow: seconds between looks (default: 10)")
  evaluate.add_argument("--timeout-s", type=float, help="with --follow: give up after so long without a checkpoint")
  _add_several(evaluate)


def _add_several(parser: argparse.ArgumentParser, *names: str) -> None:
  several = parser.add_argument_group("several processes")
  several.add_argument("--distributed", action="store_true", help="join the other hosts of this TPU slice or job")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--num-processes", type=int, metavar="N")
  several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
  help_ = "how long to wait for the others (default: 300)"
  several.add_argument("--join-timeout-s", *names, type=int, default=300, metavar="S", help=help_)


def eval_help() -> str:
  """Returns EVAL_HELP with what each protocol's docstring says first."""
  from jepa_jax.evals import PROTOCOLS, EvalConfig

  lines = [f"  {name:18s} {(cls.__doc__ or '').splitlines()[0]}" for name, cls in PROTOCOLS.items()]
  return EVAL_HELP.format(protocols="\n".join(lines), default=", ".join(EvalConfig().names))
