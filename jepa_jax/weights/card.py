"""The card of exported weights: method, data, cost and evaluation tables of the run, and a licence to fill in."""

from __future__ import annotations

from typing import Any

from jepa_jax.evals.table import markdown_table
from jepa_jax.evaluate import as_value
from jepa_jax.runs import Run
from jepa_jax.workdir import EVALS, read_json

UNKNOWN = "FILL-IN"
_USE = {
  "hf": "```python\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(FOLDER)\n```",
  "timm": "```python\nmodel.load_state_dict(safetensors.torch.load_file(FILE))  # of timm.create_model(...)\n```",
  "stablehlo": "```python\nimport pathlib\n\nimport jax\n\nencoder = jax.export.deserialize(bytearray("
  "pathlib.Path(FILE).read_bytes()))\nfeatures = encoder.call(images_uint8)  # (B, H, W, C) of the size above\n```",
  "jepa_jax": "```sh\njepa-jax eval --weights=FILE --config.data.source=folder --config.data.root=PICTURES\n```",
}


def model_card(run: Run, layout: str, license: str = "") -> str:
  """Returns the card as Markdown with the front matter of the Hugging Face hub; what no run says is left out."""
  cfg, spent = run.cfg, run.meta.get("spent", {})
  height, width = cfg.view_hw
  hours = sum(spent.get("seconds", {}).values()) / 3600
  facts = {
    "method": cfg.objective.name,
    "encoder": ", ".join(f"{key} {value}" for key, value in _encoder(cfg.encoder).items()),
    "images": f"{cfg.data.channels} channels, {height} x {width} px, mean {cfg.data.mean}, std {cfg.data.std}",
    "trained on": ", ".join(str(x) for x in (cfg.data.source, cfg.data.name, cfg.data.train) if x),
    "seen": f"{spent['examples']:,} examples, step {run.step:,}" if spent.get("examples") else "",
    "cost": f"{hours:.2f} hours of wall time, all starts together" if hours else "",
    "made by": f"jepa_jax {run.meta.get('jepa_jax', '')}, jax {run.meta.get('versions', {}).get('jax', '')}",
  }
  if imported := run.meta.get("imported"):
    facts["weights of"] = f"{imported.get('family', '')} {imported.get('from', '')}".strip()
  lines = [
    "---",
    f"license: {license or UNKNOWN}",
    "library_name: " + ("transformers" if layout == "hf" else "jepa_jax"),
  ]
  lines += ["pipeline_tag: image-feature-extraction", "---", f"# {cfg.name}", ""]
  lines += [f"- {name}: {value}" for name, value in facts.items() if value]
  if not license:
    lines += [
      "",
      f"**The licence is still to be filled in** (`{UNKNOWN}` above): that of the weights, given their data.",
    ]
  for table in _tables(run):
    lines += ["", table]
  return "\n".join([*lines, "", "## Use", _USE[layout], ""])


def _encoder(encoder: Any) -> dict[str, Any]:
  names = ("name", "variant", "image_size", "patch_size", "width", "depth", "cls_token", "num_registers", "pool")
  return {name: value for name in names if (value := getattr(encoder, name, None)) not in (None, 0, False)}


def _tables(run: Run) -> list[str]:
  found = []
  for path in sorted((run.workdir / EVALS).glob(f"{run.step}*.json")):
    try:
      table = read_json(path)
      rows = {name: {column: as_value(x) for column, x in row.items()} for name, row in table["rows"].items()}
    except (ValueError, KeyError, AttributeError, OSError):
      continue
    of = " ".join(str(table.get("data", {}).get(key, "")) for key in ("source", "name")).strip()
    found.append(f"Evaluated on {table.get('num_test', '?')} held-out images ({of}), in %:\n\n{markdown_table(rows)}")
  return found
