"""The launch scripts for Cloud TPU slices: what they would run, how they resume, and what runs on each worker."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.launcher import CONFIG, POD, ROOT, SAVES_ON_TERM, Tools, dry_run, wait_for


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
  return Tools(tmp_path / "tools")


# A TPU slice


def test_tpu_pod_dry_run(tools):
  create, pack, copy, start, *on_worker = dry_run(tools, "tpu_pod.sh", *POD, "--config.note=a b")
  assert create == (
    "gcloud compute tpus tpu-vm create pod --accelerator-type=v6e-16 --version=v2-alpha-tpuv6e "
    "--scopes=https://www.googleapis.com/auth/cloud-platform --zone=us-east5-b"
  )
  assert pack.startswith("tar -czf ") and pack.endswith(" configs jepa_jax launch requirements.txt")
  assert copy.startswith("gcloud compute tpus tpu-vm scp ") and " pod:jepa_jax.tgz --worker=all " in copy
  *_, remote, zone = shlex.split(start.replace("$'", "'").replace(r"\n", "\n"))
  assert zone == "--zone=us-east5-b" and remote.startswith("--command=bash jepa_jax/launch/tpu_worker.sh --alive")
  run = f"tpu_worker.sh --bucket=bucket --config={CONFIG} --workdir=/mnt/gcs/runs/a --config.note=a"
  assert run in remote
  train = f"{tools.venv}/bin/python -m jepa_jax train --distributed --config={CONFIG} --workdir=/mnt/gcs/runs/a"
  assert on_worker[-1] == rf"setsid {train} --config.note=a\ b"
  assert any(command.endswith(r" jax\[tpu\]") for command in on_worker)
  assert any(command.startswith("gcsfuse ") and command.endswith(" bucket /mnt/gcs") for command in on_worker)


def test_tpu_pod_takes_one_of_several_experiments_and_says_how_it_starts(tools):
  more = ("--config=configs/lejepa_imagenet.py:vith", "--config.mesh.fsdp=8", "--init-from=/mnt/gcs/runs/b:100")
  more += ("--init-what=everything", "--profile=10:14", "--accept-config-change")
  train = dry_run(tools, "tpu_pod.sh", *POD, *more)[-1]
  assert train.endswith(f" train --distributed {more[0]} --workdir=/mnt/gcs/runs/a {' '.join(more[1:])}")


@pytest.mark.parametrize(
  ("kind", "runtime"),
  [("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-16", "v2-alpha-tpuv5")],
)
def test_tpu_pod_chooses_the_image_by_type(tools, kind, runtime):
  assert f"--version={runtime} " in dry_run(tools, "tpu_pod.sh", *POD, f"--type={kind}")[0]
  assert "--version=mine " in dry_run(tools, "tpu_pod.sh", *POD, f"--type={kind}", "--runtime=mine")[0]


def test_tpu_pod_queued_spot_and_deleted_at_end(tools):
  flags = ("--queued", "--spot", "--create-flag=--reserved", "--delete-at-end", "--project=p")
  create, *_, delete = dry_run(tools, "tpu_pod.sh", *POD, *flags)
  assert create == (
    "gcloud compute tpus queued-resources create pod --node-id=pod --accelerator-type=v6e-16 "
    "--runtime-version=v2-alpha-tpuv6e --scopes=https://www.googleapis.com/auth/cloud-platform "
    "--spot --reserved --zone=us-east5-b --project=p"
  )
  assert delete == "gcloud compute tpus queued-resources delete pod --force --quiet --zone=us-east5-b --project=p"


def test_tpu_pod_stop_and_delete(tools):
  (stop,) = dry_run(tools, "tpu_pod.sh", "--stop", *POD[:2])
  assert "ssh pod --worker=all" in stop and "tpu_worker.sh" in stop and "--stop" in stop
  (delete,) = dry_run(tools, "tpu_pod.sh", "--delete", *POD[:2])
  assert delete == "gcloud compute tpus tpu-vm delete pod --quiet --zone=us-east5-b"


MISSING = (1, "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found")
READY, PREEMPTED = (0, "READY"), (0, "PREEMPTED")


def pod(tools: Tools, states: list, ssh: list[int], *args: str, queue: list | None = None, **env: str):
  """Runs tpu_pod.sh; `states` and `queue` are what gcloud says one after the other, `ssh` how the runs end."""
  tools.fake(
    "gcloud",
    ("tpu-vm describe", states),
    ("queued-resources describe", queue or [MISSING]),
    ("tpu-vm ssh", [(code, "") for code in ssh]),
  )
  return tools.bash("tpu_pod.sh", *POD, *args, **env)


def did(tools: Tools) -> list[str]:
  """What was done to the slice, in order."""
  verbs = [call.removeprefix("compute tpus ").split()[:2] for call in tools.calls("gcloud")]
  return [verb for _, verb in verbs if verb != "describe"]


def test_tpu_pod_creates_copies_and_runs(tools):
  done = pod(tools, [MISSING, READY], [0])
  assert done.returncode == 0, done.stderr
  assert did(tools) == ["create", "scp", "ssh"]
  assert "costs money" in done.stdout


def test_tpu_pod_uses_a_slice_that_is_there(tools):
  done = pod(tools, [READY], [0], "--delete-at-end")
  assert done.returncode == 0 and did(tools) == ["scp", "ssh", "delete"]


def test_tpu_pod_waits_for_a_slice_that_is_being_made(tools):
  pod(tools, [(0, "CREATING"), (0, "CREATING"), READY], [0])
  assert did(tools) == ["scp", "ssh"]


@pytest.mark.parametrize("code", [75, 76, 255, 1])
def test_tpu_pod_makes_a_preempted_slice_again_and_resumes(tools, code):
  """Saved in time (75), a worker lost (76), cut off (255), refused by gcloud as the slice is gone (1): all the same."""
  after = [] if code == 75 else [PREEMPTED]
  states = [MISSING, READY, *after, PREEMPTED, MISSING, READY]
  done = pod(tools, states, [code, 0])
  assert done.returncode == 0, done.stderr
  assert did(tools) == ["create", "scp", "ssh", "delete", "create", "scp", "ssh"]
  first, second = tools.calls("gcloud", "tpu-vm ssh pod")
  assert first == second, "the same command resumes"


def test_preemptions_are_no_crashes(tools):
  """Four times in a row without a chance to save: still resumed."""
  done = pod(tools, [READY, *[PREEMPTED, PREEMPTED, MISSING, READY] * 4], [255, 76, 137, 1, 0])
  assert done.returncode == 0, done.stdout + done.stderr
  assert did(tools).count("create") == 4


def test_tpu_pod_resumes_on_the_same_slice_after_maintenance(tools):
  assert pod(tools, [READY], [75, 0]).returncode == 0
  assert did(tools) == ["scp", "ssh", "scp", "ssh"]


@pytest.mark.parametrize("code", [2, 3])
def test_tpu_pod_stops_where_trying_again_is_useless(tools, code):
  assert pod(tools, [READY], [code, 0]).returncode == code
  assert did(tools) == ["scp", "ssh"]


def test_tpu_pod_gives_up_after_three_crashes(tools):
  done = pod(tools, [READY], [134, 255, 76], "--delete-at-end")
  assert done.returncode == 76 and did(tools) == ["scp", "ssh"] * 3 + ["delete"]


def test_tpu_pod_tries_again_when_there_is_no_capacity_after_a_preemption(tools):
  tools.fake(
    "gcloud",
    ("tpu-vm describe", [READY, PREEMPTED, MISSING, MISSING, READY]),
    ("tpu-vm create", [(1, "no more capacity in the zone"), (0, "")]),
    ("tpu-vm ssh", [(75, ""), (0, "")]),
  )
  done = tools.bash("tpu_pod.sh", *POD)
  assert done.returncode == 0, done.stderr
  assert did(tools) == ["scp", "ssh", "delete", "create", "create", "scp", "ssh"]


def test_tpu_pod_bounds_preemptions(tools):
  assert pod(tools, [READY], [75], JEPA_MAX_RESTARTS="2").returncode == 75
  assert did(tools) == ["scp", "ssh"] * 3


def test_tpu_pod_queued_waits_and_asks_again_when_suspended(tools):
  done = pod(
    tools,
    [MISSING, MISSING, READY, PREEMPTED, PREEMPTED, MISSING, READY],
    [75, 0],
    "--queued",
    queue=[MISSING, (0, "WAITING_FOR_RESOURCES"), (0, "SUSPENDING"), (0, "SUSPENDED"), MISSING],
  )
  assert done.returncode == 0, done.stderr
  assert did(tools) == ["create", "scp", "ssh", "delete", "create", "scp", "ssh"]
  assert "WAITING_FOR_RESOURCES" in done.stdout
  assert {call.split()[2] for call in tools.calls("gcloud", " create ")} == {"queued-resources"}


def test_tpu_pod_says_why_a_queued_request_failed(tools):
  done = pod(tools, [MISSING], [0], "--queued", queue=[(0, "FAILED")])
  assert done.returncode == 1 and "queued-resources describe pod" in done.stderr and did(tools) == []


def test_tpu_pod_shows_what_gcloud_says(tools):
  done = pod(tools, [(1, "ERROR: there is no active account selected")], [0])
  assert done.returncode == 1 and "no active account" in done.stderr and did(tools) == []


# What runs on each worker


@pytest.fixture
def worker(tools, tmp_path):
  """A worker whose number is asked of the fake metadata server (curl); returns how to call its script."""
  tools.fake("sudo")
  call = lambda *args, number=0, **env: (
    tools.fake("curl", ("agent-worker-number", [(0, str(number))])),
    tools.bash("tpu_worker.sh", *args, JEPA_RUN_DIR=str(tmp_path / "run"), JEPA_MOUNT=str(tmp_path / "gcs"), **env),
  )[1]
  return call


def test_worker_zero_prints_the_program_and_ends_with_its_code(tools, worker):
  tools.installed("tpu", 75, program='echo "training: $*"; exit 75')
  done = worker("--config=c", "--workdir=w", "--config.note=a b")
  assert done.returncode == 75, done.stderr
  assert "training: -m jepa_jax train --distributed --config=c --workdir=w --config.note=a b" in done.stdout


def test_another_worker_is_silent_unless_it_fails(tools, worker):
  tools.installed("tpu", program='echo "loss $CODE"; exit "$CODE"')
  assert worker("--config=c", number=3, CODE="0").stdout == ""
  done = worker("--config=c", number=3, CODE="2")
  assert done.returncode == 2 and "worker 3 ended with code 2" in done.stdout and "loss 2" in done.stdout


def test_a_run_outlives_the_connection_and_is_followed_again(tools, worker, tmp_path):
  tools.installed("tpu", program=SAVES_ON_TERM)
  started, env = tmp_path / "started", {"JEPA_RUN_DIR": str(tmp_path / "run")}
  tools.fake("curl", ("agent-worker-number", [(0, "0")]))
  assert worker("--alive").returncode == 1
  first = tools.start("tpu_worker.sh", "--config=c", STARTED=str(started), **env)
  wait_for(started)
  first.kill()
  first.wait()
  assert worker("--alive").returncode == 0
  busy = worker("--config=other")
  assert busy.returncode == 2 and "busy with another run" in busy.stdout and "--stop" in busy.stdout
  second = tools.start("tpu_worker.sh", "--config=c", STARTED=str(started), **env)
  assert second.stdout is not None and "following it" in second.stdout.readline()
  assert worker("--stop").returncode == 0
  assert second.wait(timeout=120) == 75
  assert started.read_text() == "started\n", "it was started once"
  assert worker("--alive").returncode == 1


def test_stop_kills_what_hangs(tools, worker, tmp_path):
  tools.installed("tpu", program='trap "" TERM; touch "$STARTED"; for _ in {1..400}; do sleep 0.05; done')
  started = tmp_path / "started"
  running = tools.start("tpu_worker.sh", "--config=c", STARTED=str(started), JEPA_RUN_DIR=str(tmp_path / "run"))
  wait_for(started)
  assert worker("--stop", JEPA_STOP_S="0.2").returncode == 0
  assert running.wait(timeout=120) == 137
  assert worker("--alive").returncode == 1


def test_a_worker_that_was_killed_says_137(tools, worker):
  tools.installed("tpu", program="kill -9 $PPID; sleep 0.2")
  assert worker("--config=c").returncode == 137


@pytest.mark.parametrize("renames", [True, False])
def test_a_bucket_whose_folders_cannot_be_renamed_is_refused(tools, worker, tmp_path, renames):
  tools.installed("tpu")
  (tmp_path / "gcs").mkdir()
  tools.fake("gcsfuse")
  tools.fake("mountpoint", ("", [(1, "")]))
  if not renames:
    tools.fake("mv", ("", [(1, "mv: cannot move: Function not implemented")]))
  done = worker("--bucket=b", "--config=c")
  assert tools.calls("gcsfuse")[0].endswith(f" b {tmp_path}/gcs")
  assert list((tmp_path / "gcs").iterdir()) == []
  if renames:
    assert done.returncode == 0, done.stderr
  else:
    assert done.returncode == 1 and "--enable-hierarchical-namespace" in done.stderr and not tools.calls("train")


# The document


def test_every_launch_command_in_the_document_is_one_that_the_script_takes(tools):
  """The commands of docs/tpu.md, with their placeholders filled in, pass the scripts' own checks in a dry run."""
  text = re.sub(r"\\\n\s*", " ", (ROOT / "docs" / "tpu.md").read_text())
  commands = re.findall(r"^bash launch/(\S+) (.*)$", text, re.M)
  assert {script for script, _ in commands} >= {"tpu_pod.sh", "gke/submit.sh", "gpu_node.sh", "docker.sh"}
  for script, rest in commands:
    args = [arg for arg in shlex.split(rest, comments=True) if arg != "--dry-run"]
    done = tools.bash(script, "--dry-run", *args, JAX_EXTRA="cuda13")
    assert done.returncode == 0, f"{script} {rest}: {done.stderr}"
