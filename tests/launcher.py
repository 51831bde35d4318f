"""What the tests of the launch scripts share: fakes of the programs that the scripts call.

Nothing reaches a cloud: gcloud, kubectl, srun and the like are fakes on PATH that write down how they were called and
answer as the test says, so that the logic after a preemption really runs.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("gpu_node.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh", "docker.sh", "gke/submit.sh")
CONFIG = "configs/lejepa_digits.py"
POD = ("--name=pod", "--zone=us-east5-b", "--type=v6e-16", "--bucket=bucket", f"--config={CONFIG}", "--workdir=runs/a")
GKE = ("--name=a", "--type=v6e", "--image=i:tpu", "--bucket=bucket", f"--config={CONFIG}", "--workdir=runs/a")

# Writes down its arguments, then gives the first answer [exit code, output] of the first rule whose text occurs in
# them; an answer that is not the last of its rule is given once.
FAKE = """
import fcntl, json, pathlib, sys
folder = pathlib.Path(__file__).parent
name, args = pathlib.Path(__file__).name, sys.argv[1:]
with open(folder / "lock", "w") as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([name, *args]) + "\\n")
  path = folder / (name + ".json")
  rules = json.loads(path.read_text())
  code, output = 0, ""
  for text, answers in rules:
    if text in " ".join(args):
      code, output = answers.pop(0) if len(answers) > 1 else answers[0]
      break
  path.write_text(json.dumps(rules))
print(output, file=sys.stderr if code else sys.stdout)
sys.exit(code)
"""


class Tools:
  """A folder for the front of PATH, with fake programs and a virtual environment that is installed already."""

  def __init__(self, folder: Path):
    self.folder, self.venv = folder, folder / "venv"
    folder.mkdir()

  def fake(self, name: str, *rules: tuple[str, list[tuple[int, str]]], folder: Path | None = None) -> None:
    folder = folder or self.folder
    (folder / f"{name}.json").write_text(json.dumps(rules))
    (folder / name).write_text(f"#!{sys.executable} -SE\n{FAKE}")
    (folder / name).chmod(0o755)

  def script(self, path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)

  def installed(self, extra: str, *codes: int, program: str = "") -> None:
    """The environment's Python: the program ends with one of `codes` after the other, or is the bash text `program`."""
    (self.venv / "bin").mkdir(parents=True)
    (self.venv / "installed").mkdir()
    (self.venv / "pyvenv.cfg").touch()
    stamp = f"python 3.12, jax extra: {extra}\n" + (ROOT / "requirements.txt").read_text()
    (self.venv / "installed" / "requirements.txt").write_text(stamp)
    self.fake("train", ("", [(code, f"ends with {code}") for code in codes or (0,)]))
    run = program or f'exec {shlex.quote(str(self.folder / "train"))} "$@"'
    self.script(self.venv / "bin" / "python", f'if [ "$1" = -c ]; then echo 3.12; exit; fi\n{run}')

  def calls(self, name: str, contains: str = "") -> list[str]:
    path = self.folder / "calls"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [" ".join(args) for tool, *args in lines if tool == name and contains in " ".join(args)]

  def env(self, **more: str) -> dict[str, str]:
    ours = ("PYTHON", "JEPA_", "JAX_", "XLA_", "SLURM_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    settings = {"JEPA_VENV": str(self.venv), "JEPA_BACKOFF_S": "0", "JEPA_POLL_S": "0", "JEPA_GPU_DEVICES": "/"}
    return clean | settings | {"PATH": f"{self.folder}:{os.environ['PATH']}"} | more

  def bash(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *args]
    return subprocess.run(command, cwd=ROOT, env=self.env(**env), capture_output=True, text=True, timeout=60)

  def start(self, script: str, *args: str, **env: str) -> subprocess.Popen:
    command = ["bash", str(LAUNCH / script), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell leaves Ctrl-C ignored in what it starts in the background, and this suite may have been started so.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, env=self.env(**env), **pipes)


def dry_run(tools: Tools, script: str, *args: str, **env: str) -> list[str]:
  done = tools.bash(script, "--dry-run", *args, **env)
  assert done.returncode == 0, done.stderr
  assert not tools.venv.exists() and not (tools.folder / "calls").exists(), "a dry run changes nothing"
  return [line.removeprefix("would run: ") for line in done.stdout.splitlines() if line.startswith("would run: ")]


def wait_for(path: Path) -> None:
  deadline = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < deadline, f"{path} never came"
    time.sleep(0.02)


# A program that says that it has started, and on SIGTERM saves and ends with 75. It ends by itself where a test fails.
SAVES_ON_TERM = 'trap "exit 75" TERM\necho started >>"$STARTED"\nfor _ in {1..400}; do sleep 0.05; done'
