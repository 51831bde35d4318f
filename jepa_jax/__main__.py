"""python -m jepa_jax {train, eval, study, show, ...}: where commands begin."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_jax import __version__
from jepa_jax.faked_devices import give_threads
from jepa_jax.flags import TRAIN_HELP, add_eval, add_train, eval_help
from jepa_jax.huge_pages import restart_with_huge_pages

if TYPE_CHECKING:
  from jepa_jax.config import Config

COMMAND = "jepa-jax"  # of an installed wheel
BENCHES = ("sigreg", "step", "nuclear", "probes", "faults", "fuzz", "masking", "against", "methods", "clip", "data")
STUDIES = (
  "double_descent",
  "scaling_law",
  "ablation",
  "collapse",
  "equivariance",
  "selection",
  "slices",
  "statistic",
  "architectures",
  "few_images",
  "choices",
  "multimodal",
  "spectrum",
  "push",
)
SHOWS = ("predictions", "world_model", "retrieval", "segmentation")
# What the exit status says to whoever supervises the process; launch/ and docs/tpu.md go by these.
INPUT_ERROR, DIVERGED, STORAGE_FAILED = 2, 3, 74  # and 75, 76: distributed.EXIT_PREEMPTED, EXIT_PEER_LOST

_LESS_MEMORY = "Lower config.batch_size, data.canvas_px, data.max_aspect, data.prefetch or data.cache_mb"
_LESS_IN_GENERAL = "Ask for less at a time: smaller batches, images or networks"
_LESS_ON_DEVICE = {
  "train": "Raise config.microbatch (the batch goes through in parts, to the same result), lower config.batch_size, "
  "or set config.encoder.remat=block; `plan` says what a step needs",
  "eval": "Lower config.evals.batch_size, of tuning config.evals.tuning.batch_size, of label maps the windows",
}
_OF_STORAGE = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO} if sys.platform == "linux" else {errno.EIO}


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns its exit status (see `train --help`), what went wrong is on stderr."""
  argv = sys.argv[1:] if argv is None else argv
  give_threads()
  with _stopped_early(argv):
    return _main(argv)


def _main(argv: list[str]) -> int:
  parser, modules = _parser(argv)
  args, rest = parser.parse_known_args(argv)
  overrides = {}
  for item in rest:
    key, equals, value = item.partition("=")
    if args.command == "bench" or not key.startswith("--config.") or not equals:
      hint = " (settings are changed by --config.some.key=value)" if args.command != "bench" else ""
      parser.error(f"unrecognised argument {item}{hint}")
    overrides[key.removeprefix("--config.")] = value
  _use_compile_cache()
  from jepa_jax import distributed
  from jepa_jax.data import StorageFailed, TooManyBadImages

  try:
    with _out_of_memory_said():
      return _run(args, overrides, modules)
  except distributed.Preempted as stopped:  # of a run, or of a study that trains many
    _tell(stopped)
    distributed.shutdown()
    return distributed.EXIT_PREEMPTED
  except (ValueError, OSError, FloatingPointError, TooManyBadImages, MemoryError) as error:
    if os.environ.get("JEPA_JAX_TRACEBACK"):
      raise
    hint = _LESS_ON_DEVICE.get(args.command, _LESS_IN_GENERAL) if "of a device" in str(error) else _LESS_MEMORY
    said = f"out of memory ({error}). {hint}" if isinstance(error, MemoryError) else error
    _tell(f"\njepa_jax {args.command}: {said}\n(JEPA_JAX_TRACEBACK=1 shows where it was raised)")
    status = DIVERGED if isinstance(error, FloatingPointError) else INPUT_ERROR
    if isinstance(error, StorageFailed) or getattr(error, "errno", None) in _OF_STORAGE:
      status = STORAGE_FAILED
    if isinstance(error, TimeoutError | ConnectionError):  # a process that came late or never: worth another start
      status = distributed.EXIT_PEER_LOST
    if distributed.num_processes() > 1:
      distributed.abandon(status, str(error))  # the others learn it, and end too
    return status


@contextlib.contextmanager
def _out_of_memory_said() -> Iterator[None]:
  """Turns what XLA raises where a device has too little memory into a MemoryError; other errors pass."""
  import jax

  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # On a CPU a matrix product that finds no room says only that it failed (JAX 0.10).
    if not re.search("RESOURCE_EXHAUSTED|out of memory|YNNPACK operation failed", str(error), re.IGNORECASE):
      raise
    first = str(error).splitlines()[0][:200]
    raise MemoryError(f"of a device: {first}") from error


def _tell(text: object) -> None:
  with contextlib.suppress(OSError):  # stderr is a file on a full disk: the status says it, and the others must hear
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped_early(argv: list[str]) -> Iterator[None]:
  """SIGTERM before training listens for it, while JAX is imported say, ends with the status that asks to be resumed."""
  if argv[:1] != ["train"] or threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(*_: object) -> None:
    with contextlib.suppress(OSError):
      os.write(2, b"Stopped as asked, before the first step. The same command starts it again\n")
    os._exit(75)  # EXIT_PREEMPTED, whose module may be what is being imported

  previous = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


def _parser(argv: list[str]) -> tuple[argparse.ArgumentParser, dict]:
  """Returns the parser, and the modules of the commands that bring arguments of their own."""
  prog = COMMAND if Path(sys.argv[0]).name == COMMAND else "python -m jepa_jax"
  parser = argparse.ArgumentParser(prog=prog, description="Joint-embedding self-supervised learning in JAX.")
  parser.add_argument("--version", action="version", version=f"jepa_jax {__version__}")
  shown = "{train,eval,report,configs,data,features,verify,plan,weights,tokenizer,study,show,bench}"
  commands = parser.add_subparsers(dest="command", required=True, metavar=shown)
  text = argparse.RawDescriptionHelpFormatter
  help_ = "train one config to its end, or resume it"
  add_train(commands.add_parser("train", help=help_, epilog=TRAIN_HELP, formatter_class=text))
  help_ = "evaluate a checkpoint: kNN, probes, few labels, retrieval, a world model's MRR and predictor tuning"
  epilog = eval_help() if argv[:1] == ["eval"] else ""
  add_eval(commands.add_parser("eval", help=help_, epilog=epilog, formatter_class=text))
  plan = commands.add_parser(
    "plan", help="compile a config for chips that are not here: does it fit, what does it move"
  )
  report = commands.add_parser("report", help="one HTML file about runs: curves, tables, pictures, what to worry about")
  configs = commands.add_parser("configs", help="the experiments that come with the project, a line each")
  data = commands.add_parser("data", help="look at the data of a config: what there is, its mean and deviation")
  features = commands.add_parser("features", help="features of your images, in one file with their names")
  verify = commands.add_parser("verify", help="are the files of checkpoints what was written?")
  weights = commands.add_parser("weights", help="published weights: inspect, import, compare, export, push")
  tokenizer = commands.add_parser("tokenizer", help="texts to numbers: train one on captions, look at one")
  groups = {"study": STUDIES, "show": SHOWS, "bench": BENCHES}
  about = {
    "study": "many small runs, their table, figures and verdict",
    "show": "pictures of what a checkpoint has learned",
    "bench": "measure; prints one JSON object",
  }
  modules = {}  # imported only for their command: --help of the others stays quick
  single = {"configs": (configs, "shipped"), "features": (features, "features"), "data": (data, "look")}
  single |= {"report": (report, "report.command"), "plan": (plan, "plan"), "verify": (verify, "verify")}
  single |= {"weights": (weights, "weights.command"), "tokenizer": (tokenizer, "tokenizer")}
  for name, (subparser, place) in single.items():
    if argv[:1] == [name]:
      modules[name] = importlib.import_module(f"jepa_jax.{place}")
      modules[name].add_arguments(subparser)
  for command, names in groups.items():
    members = commands.add_parser(command, help=about[command]).add_subparsers(
      dest="name", metavar=f"{{{','.join(names)}}}"
    )
    for name in names if argv[:1] == [command] else ():
      modules[name] = importlib.import_module(f"jepa_jax.{command}.{name}")
      modules[name].add_arguments(members.add_parser(name, help=modules[name].DESCRIPTION))
  return parser, modules


def _use_compile_cache() -> None:
  """Keeps compiled programs between starts, unless JAX's own variable says where, or (set but empty) that not to."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    import jax

    from jepa_jax.workdir import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))


def _run(args: argparse.Namespace, overrides: dict[str, str], modules: dict) -> int:
  if args.command in ("bench", "study", "show"):
    if not args.name:
      print("\n".join(f"{name:16s} {module.DESCRIPTION}" for name, module in modules.items()))
      return 0
    options, module = {k: v for k, v in vars(args).items() if k not in ("command", "name")}, modules[args.name]
    result = module.run(**options) if args.command == "bench" else module.run(overrides=overrides, **options)
    print(module.render(result) if args.command == "study" else json.dumps(result, indent=2))
    return 0
  if args.command in ("report", "configs", "data", "features", "plan", "weights", "verify", "tokenizer"):
    options, module = {k: v for k, v in vars(args).items() if k not in ("command", "json")}, modules[args.command]
    result = module.run(overrides=overrides, **options)
    print(json.dumps(result, indent=2) if args.json else module.render(result))
    return 0 if args.command != "verify" or result["whole"] else INPUT_ERROR
  from jepa_jax import telemetry

  telemetry.setup_logging()
  return _train(args, overrides) if args.command == "train" else _evaluate(args, overrides)


def _train(args: argparse.Namespace, overrides: dict[str, str]) -> int:
  from jepa_jax import distributed
  from jepa_jax.config import load_config, to_dict

  cfg = load_config(args.config, overrides)
  if args.print_config:
    print(json.dumps(to_dict(cfg), indent=2))
    return 0
  if not args.workdir:
    raise ValueError("--workdir is missing: name a folder for this run, such as --workdir=workdirs/" + cfg.name)
  from jepa_jax.train import Start, train

  profiled = _profiled(args.profile)
  _join_others(args)
  start = Start(args.accept_config_change, _start_of(args, cfg), args.init_what, profiled)
  train(cfg, args.workdir, start)
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is lost any more, and no other start is needed
  if distributed.is_primary():
    _say_where(Path(args.workdir))
  distributed.shutdown()
  return 0


def _start_of(args: argparse.Namespace, cfg: Config) -> str:
  """Returns the workdir to start from: as it is given, or that of "weights:FILE", which is imported.

  No array shows the number of heads: it is the config's, where the file does not say otherwise.
  """
  source = args.init_from.removeprefix("weights:")
  if source == args.init_from:
    if args.item or args.ignore:
      raise ValueError("--item and --ignore say what to take from a file of weights: --init-from=weights:FILE")
    return args.init_from
  heads = cfg.encoder.num_heads_to_split
  return _import(source, "", {"encoder.num_heads": str(heads)} if heads > 1 else {}, args.item, args.ignore)


def _import(source: str, workdir: str, own: dict[str, str], item: str = "", ignore: str = "") -> str:
  """Returns the workdir that holds an encoder of published weights; process 0 makes it, and says what they are."""
  from jepa_jax import distributed
  from jepa_jax.weights import command, encoders

  workdir = workdir or encoders.workdir_for(source)
  if distributed.is_primary():
    print(command.render(encoders.import_encoder(source, workdir, own, item=item, ignore=ignore)), flush=True)
  distributed.barrier("imported", timeout_s=24 * 3600)
  return workdir


def _join_others(args: argparse.Namespace) -> None:
  from jepa_jax import distributed

  several = (args.coordinator, args.num_processes, args.process_id)
  if args.distributed or any(value is not None for value in several):
    distributed.initialise(*several, timeout_s=args.join_timeout_s)


def _profiled(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile={text}: write the first and the last step, counted from this start, such as 10:14")
  return int(first), int(last)


def _evaluate(args: argparse.Namespace, overrides: dict[str, str]) -> int:
  from jepa_jax import distributed
  from jepa_jax.evals import check_evals
  from jepa_jax.evaluate import evaluate
  from jepa_jax.follow import Asked, follow

  names = tuple(n.strip() for n in args.evals.split(",")) if args.evals else None
  check_evals(names or ())
  if not args.follow and (args.poll_s is not None or args.timeout_s is not None):
    raise ValueError("--poll-s and --timeout-s are for --follow")
  if args.follow and (args.step is not None or args.again):
    raise ValueError("--follow evaluates every checkpoint once; leave out --step and --again")
  if not args.workdir and not args.weights:
    raise ValueError("--workdir is missing: the folder of a run; or --weights: a file of published weights")
  if not args.weights and (args.item or args.ignore):
    raise ValueError("--item and --ignore say what to take from a file of weights: --weights=FILE")
  _join_others(args)
  if args.weights:
    args.workdir, overrides = _imported(args, overrides)
  if args.follow and distributed.num_processes() > 1:
    raise ValueError("--follow runs in one process; give one checkpoint by --step to evaluate it with several")
  if args.follow:
    asked = Asked(overrides, names, not args.no_baselines)
    follow(args.workdir, asked, 10 if args.poll_s is None else args.poll_s, args.timeout_s)
  else:
    evaluate(args.workdir, args.step, overrides, names, not args.no_baselines, again=args.again)
  distributed.shutdown()
  return 0


def _imported(args: argparse.Namespace, overrides: dict[str, str]) -> tuple[str, dict[str, str]]:
  """Returns the workdir that holds the weights, and the overrides less those that the weights have used."""
  from jepa_jax.evaluate import check_overrides
  from jepa_jax.weights import encoders

  if args.follow or args.step is not None:
    raise ValueError("--weights are one checkpoint: leave out --follow and --step")
  own, rest = encoders.split_overrides(overrides)
  check_overrides(rest)
  if "data.source" not in rest:
    raise ValueError("--weights are evaluated on your images: --config.data.source=folder --config.data.root=PICTURES")
  workdir = _import(args.weights, args.workdir, own, args.item, args.ignore)
  return workdir, encoders.with_canvas(rest, workdir)


def _say_where(workdir: Path) -> None:
  log = logging.getLogger("jepa_jax")
  rows = (("checkpoints", "checkpoints/"), ("metrics", "metrics.jsonl"), ("pictures", "views.png"), ("", "curves.png"))
  for label, name in rows:
    if (workdir / name.rstrip("/")).exists():
      log.info("%-12s %s", label, workdir / name)


def console() -> None:
  """The command of a wheel, and `python -m jepa_jax`."""
  restart_with_huge_pages()
  # Imports and traces make a great many objects that stay: looking through them for garbage is a tenth of a start.
  gc.set_threshold(200_000, 50, 50)
  sys.exit(main())


if __name__ == "__main__":
  console()
