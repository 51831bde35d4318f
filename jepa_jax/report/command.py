"""`report`: one HTML file about one or several runs; or the same page served while a run goes on."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import http.server
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jepa_jax.checkpoint import CheckpointError
from jepa_jax.report import page, pictures
from jepa_jax.report.facts import Facts, names_of, read_facts
from jepa_jax.workdir import CONFIG, VIEWS, check_can_hold, write_whole, written_by

log = logging.getLogger(__name__)
DESCRIPTION = (
  "one HTML file about runs, without network: curves, evaluations, views, neighbours, and what to worry about"
)
LARGEST_BYTES = 5_000_000
_REFRESH_S = 15
_AGAIN = f'<!doctype html><meta http-equiv="refresh" content="{_REFRESH_S}">'
_EPILOG = "Held-out images are read for neighbours, spectrum and maps; --images=0 leaves these sections out."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `run`."""
  parser.description, parser.epilog = DESCRIPTION, _EPILOG
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of runs, which are drawn over one another")
  parser.add_argument("--out", default="", metavar="FILE", help="the page (default: <first workdir>/report.html)")
  parser.add_argument("--images", type=int, default=512, metavar="N", help="held-out images to look at (default: 512)")
  parser.add_argument("--serve", action="store_true", help="serve it on 127.0.0.1, made anew as the run goes on")
  parser.add_argument("--port", type=int, default=8765, help="of --serve (default: 8765)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(
  workdirs: Sequence[str],
  out: str = "",
  images: int = 512,
  serve: bool = False,
  port: int = 8765,
  overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Writes the page and returns {"out", "bytes", "left_out": {section: why}}; with `serve` it serves until Ctrl-C.

  overrides: settings of the data (data.root, ...), where the images lie in another place than in training. ValueError
  for a folder that holds no run.
  """
  if images < 0:
    raise ValueError(f"--images={images}: how many held-out images are looked at, 0 for none")
  if foreign := [key for key in overrides or {} if not key.startswith(("data.", "evals."))]:
    raise ValueError(f"--config.{foreign[0]}: a report changes no run; only data.* and evals.* say where images are")
  folders = [Path(workdir).expanduser().resolve() for workdir in dict.fromkeys(workdirs)]
  if serve:
    return _serve(folders, images, port, overrides)
  path = Path(out).expanduser() if out else folders[0] / "report.html"
  runs = [read_facts(*pair) for pair in zip(folders, names_of(folders), strict=True)]
  check_can_hold(path, f"--out={out}")
  if path.is_dir():
    raise ValueError(f"--out={out} is a folder: give the name of a file, such as {path / 'report.html'}")
  found, left_out = sections(runs, images, overrides)
  text = page.page(runs, found, _made())
  if len(text.encode()) > LARGEST_BYTES:
    left_out["pictures"] = f"the page would have {len(text) / 1e6:.1f} MB; ask for fewer workdirs at once"
    text = page.page(runs, [], _made())
  write_whole(path, text)
  return {"out": str(path), "bytes": len(text.encode()), "left_out": left_out}


def sections(
  runs: Sequence[Facts], images: int, overrides: Mapping[str, str] | None
) -> tuple[list[str], dict[str, str]]:
  """Returns the sections with pictures, and why others are left out."""
  found, left_out, spectra = [], {}, {}
  for run in runs:
    of = f", {run.name}" if len(runs) > 1 else ""
    if (run.workdir / VIEWS).exists():
      found.append(page.picture(f"Views{of}", _VIEWS, pictures.as_jpeg((run.workdir / VIEWS).read_bytes())))
    if not images:
      continue
    try:
      opened, seen = pictures.look(run.workdir, images, overrides)
    except (ValueError, OSError, CheckpointError) as error:
      left_out[f"neighbours, spectrum, maps{of}"] = str(error)
      continue
    spectra[run.name] = pictures.spectrum(seen)
    shown, agree = pictures.neighbours(seen)
    said = f" {agree:.1f} % of the six nearest are of the same class." if agree == agree else ""
    found.append(
      page.picture(f"Neighbours{of}", f"{_NEIGHBOURS.format(len(seen.shown))}{said}", pictures.as_jpeg(shown))
    )
    if (maps := pictures.patch_maps(seen)) is not None:
      found.append(page.picture(f"Features of patches{of}", _MAPS, pictures.as_jpeg(maps)))
    for title, about, png in pictures.of_method(opened, overrides):
      found.append(page.picture(f"{title}{of}", about, pictures.as_jpeg(png)))
  if spectra:
    found.append(page.spectra(spectra))
  if left_out:
    lines = "".join(
      page.section(f"Left out: {name}", f"<p>{page.html.escape(why)}</p>") for name, why in left_out.items()
    )
    found.append(lines)
  return found, left_out


_VIEWS = (
  "What the first step saw, a row for each image: first the picture on its canvas (black is padding, which no view "
  "shows), then its views."
)
_NEIGHBOURS = (
  "In each row a held-out image and, behind the gap, the six nearest of {} by the cosine of their centred features; "
  "green frames are of its class, red ones are not."
)
_MAPS = (
  "Held-out images, and the first three principal components of the features of their patches as red, green and blue "
  "(components of all patches together): what has one colour is alike to the encoder."
)


def _made() -> str:
  now, by = datetime.datetime.now(datetime.UTC), written_by()
  return f"Made {now:%Y-%m-%d %H:%M} UTC by jepa_jax {by['version']}, commit {by['commit']}. The file needs no network."


def render(result: dict[str, Any]) -> str:
  """Returns where the page is, and what it lacks."""
  if "served" in result:
    return f"Served {result['served']} pages."
  lines = [f"{result['out']} ({result['bytes'] / 1e6:.2f} MB)"]
  return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in result["left_out"].items())])


# ---------------------------------------------------------------- served while a run goes on


class Live:
  """The page of runs that go on: curves of now, pictures of the newest checkpoint, kept until there is another."""

  def __init__(self, folders: Sequence[Path], images: int, overrides: Mapping[str, str] | None):
    self._folders, self._images, self._overrides = folders, images, overrides
    self._pictures: tuple[Any, list[str]] = (None, [])
    self._lock = threading.Lock()  # a page at a time

  def html(self) -> str:
    """Returns the page of now."""
    with self._lock:
      return self._html()

  def _html(self) -> str:
    runs = [read_facts(*pair) for pair in zip(self._folders, names_of(list(self._folders)), strict=True)]
    checkpoints = [run.steps[-1:] for run in runs]
    if self._pictures[0] != checkpoints:
      self._pictures = (checkpoints, sections(runs, self._images if all(checkpoints) else 0, self._overrides)[0])
    refresh_s = 0 if all(run.ended is not None for run in runs) else _REFRESH_S
    return page.page(runs, self._pictures[1], _made(), refresh_s)


def _serve(folders: list[Path], images: int, port: int, overrides: Mapping[str, str] | None) -> dict[str, Any]:
  for folder in folders:
    if not (folder / CONFIG).exists():
      read_facts(folder, folder.name)  # raises what says that there is no run
  try:
    server = make_server(Live(folders, images, overrides).html, port)
  except OSError as error:
    raise ValueError(f"--port={port} cannot be taken ({error}): give another one") from error
  print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
  try:
    server.serve_forever()
  except KeyboardInterrupt:
    pass
  finally:
    server.server_close()
  return {"served": server.served}


class _Server(http.server.ThreadingHTTPServer):
  served, daemon_threads = 0, True


def make_server(html: Callable[[], str], port: int) -> _Server:
  """Returns a server of one page, on this machine alone; port 0: any that is free."""
  return _Server(("127.0.0.1", port), functools.partial(_Handler, html))


class _Handler(http.server.BaseHTTPRequestHandler):
  timeout = 10  # of a connection that says nothing

  def __init__(self, html: Callable[[], str], *args: Any):
    self._html = html
    super().__init__(*args)

  def do_GET(self) -> None:
    if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
      self.send_error(403, "only as 127.0.0.1 or localhost")  # another site's name that leads here may not read it
      return
    if self.path.partition("?")[0] != "/":
      self.send_error(404)
      return
    try:
      body, status = self._html().encode(), 200
    except Exception as error:  # a file is being written: the next look finds it whole
      body, status = f"{_AGAIN}<p>{page.html.escape(str(error))}</p>".encode(), 500
    with contextlib.suppress(ConnectionError):  # who asked has gone
      self.send_response(status)
      self.send_header("Content-Type", "text/html; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)
    assert isinstance(self.server, _Server)
    self.server.served += 1

  def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name in the library)
    log.debug(format, *args)
