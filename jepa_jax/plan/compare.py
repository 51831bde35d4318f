"""Two settings of one config side by side: what the second one changes in the compiled step."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping


def read_settings(text: str) -> dict[str, str]:
  """Returns {"encoder.remat": "none", ...} of "encoder.remat=none ..."; ValueError for what is no KEY=VALUE."""
  settings = {}
  try:
    parts = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"--compare={text}: {error}; write KEY=VALUE ..., a value with spaces in quotes") from error
  for part in parts:
    key, equals, value = part.removeprefix("--").removeprefix("config.").partition("=")
    if not (key and equals):
      raise ValueError(
        f"--compare={text}: {part!r} is no KEY=VALUE; write what differs, for example "
        '--compare="encoder.remat=none objective.predictor.remat=none"'
      )
    settings[key] = value
  if not settings:
    raise ValueError('--compare is empty: write what differs, for example --compare="encoder.remat=none"')
  return settings


def compare(first: dict, second: dict, settings: Mapping[str, str]) -> dict:
  """Returns both plans and a row for each of their numbers: {"what", "unit", "first", "second"}, None where one has it
  not."""
  a, b = dict(_numbers(first)), dict(_numbers(second))
  rows = [
    {"what": what, "unit": unit, "first": a.get((what, unit)), "second": b.get((what, unit))} for what, unit in a | b
  ]
  names = ("config", "topology", "num_chips", "mesh", "batch_size")
  return {name: first[name] for name in names} | {"settings": dict(settings), "rows": rows, "plans": [first, second]}


def _numbers(plan: dict) -> Iterator[tuple[tuple[str, str], float]]:
  memory = plan["memory"]
  for name in ("total", "arguments", "temporaries"):
    if f"{name}_bytes" in memory:
      yield (f"memory, {name}", "GiB"), memory[f"{name}_bytes"] / 2**30
  yield ("matrix FLOPs of a step", "TFLOP"), plan["flops"]["per_step"] / 1e12
  for name, value in (plan["memory_traffic_bytes"] or {}).items():
    yield (f"traffic, {name}", "GB"), value / 1e9
  for row in plan["roofline"] or ():
    yield (f"kernels, {row['category']}", "ms"), row["ms"]
  for row in plan["collectives"]:
    when = "" if row["every_step"] else ", some steps only"
    yield (f"{row['kind']}, {row['link']}{when}: sites", ""), row["sites"]
    yield (f"{row['kind']}, {row['link']}{when}: sent", "MB"), row["sent_bytes"] / 1e6
  for name in ("kernels", "ici", "dcn", "step"):
    if plan["estimate"]:
      yield (f"estimate, {name}", "ms"), plan["estimate"][f"{name}_ms"]
  yield ("compiled in", "s"), plan["compile_s"]


def render(found: dict) -> str:
  """Returns the table as text, with the ratio second / first."""
  lines = [
    f"{found['config']} on {found['topology']}: {found['num_chips']} chips, mesh {found['mesh']}, batch "
    f"{found['batch_size']}",
    "first: as given. second: with " + " ".join(f"{key}={value}" for key, value in found["settings"].items()),
    *dict.fromkeys(note for plan in found["plans"] for note in plan["notes"]),
    *(
      f"{name}: DOES NOT FIT"
      for name, plan in zip(("first", "second"), found["plans"])
      if plan["memory"]["fits"] is False
    ),
    "",
    f"{'':44s}{'first':>12s}{'second':>12s}{'second / first':>16s}",
  ]
  for row in found["rows"]:
    a, b, unit = row["first"], row["second"], row["unit"]
    ratio = f"{b / a:.3f}" if a and b is not None else "-"
    what = f"{row['what']}, {unit}" if unit else row["what"]
    lines.append(f"{what:44s}{_number(a, unit):>12s}{_number(b, unit):>12s}{ratio:>16s}")
  return "\n".join(lines)


def _number(x: float | None, unit: str) -> str:
  if x is None:
    return "-"
  return f"{x:,.3f}" if unit else f"{x:,}"
