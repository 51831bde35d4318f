"""The JobSet for GKE against its schema, and the container images, which are not built here but read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.launcher import CONFIG, GKE, ROOT, Tools, dry_run


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
  return Tools(tmp_path / "tools")


# GKE


def closed(**properties) -> dict:
  """An object with these properties, all required but those that end in `_`, and no others."""
  required = [name for name in properties if not name.endswith("_")]
  return {
    "type": "object",
    "properties": {name.rstrip("_"): schema for name, schema in properties.items()},
    "required": required,
    "additionalProperties": False,
  }


def many(items: dict) -> dict:
  return {"type": "array", "items": items, "minItems": 1}


STRING, NUMBER = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
EXIT_CODES = closed(
  containerName_=STRING, operator={"enum": ["In", "NotIn"]}, values=many({"type": "integer", "minimum": 1})
)
POD_RULE = closed(
  action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
  onExitCodes_=EXIT_CODES,
  onPodConditions_=many(closed(type=STRING, status={"enum": ["True", "False", "Unknown"]})),
)
CONTAINER = closed(
  name=STRING,
  image=STRING,
  args=many(STRING),
  resources=closed(
    requests={"type": "object", "additionalProperties": NUMBER},
    limits={"type": "object", "additionalProperties": NUMBER},
  ),
  volumeMounts=many(closed(name=STRING, mountPath=STRING)),
)
VOLUME = closed(
  name=STRING,
  csi_=closed(driver=STRING, readOnly_={"type": "boolean"}, volumeAttributes=STRINGS),
  emptyDir_=closed(medium={"enum": ["", "Memory"]}),
)
POD_SPEC = closed(
  restartPolicy={"const": "Never"},  # the only one that podFailurePolicy allows
  serviceAccountName=STRING,
  terminationGracePeriodSeconds=NUMBER,
  nodeSelector=STRINGS,
  tolerations=many(closed(key=STRING, operator={"const": "Exists"}, effect={"const": "NoSchedule"})),
  securityContext=closed(runAsUser={"type": "integer"}),
  containers=many(CONTAINER),
  volumes=many(VOLUME),
)
JOB_SPEC = closed(
  completionMode={"const": "Indexed"},
  parallelism=NUMBER,
  completions=NUMBER,
  backoffLimit={"type": "integer", "minimum": 0},
  podFailurePolicy=closed(rules=many(POD_RULE)),
  template=closed(metadata=closed(annotations=STRINGS), spec=POD_SPEC),
)
JOB_FAILURES = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy"
JOBSET_RULE = closed(
  name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
  action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
  onJobFailureReasons_=many({"enum": JOB_FAILURES.split()}),
)
# The part of JobSet v1alpha2 and of batch/v1 Job that the manifest uses, closed, so that a misspelt field is an error:
# github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go; kubernetes.io, Job v1.
JOBSET = closed(
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=closed(name=STRING, namespace=STRING, annotations=STRINGS),
  spec=closed(
    failurePolicy=closed(maxRestarts={"type": "integer", "minimum": 0}, rules=many(JOBSET_RULE)),
    replicatedJobs=many(closed(name=STRING, replicas=NUMBER, template=closed(spec=JOB_SPEC))),
  ),
)


def manifest(tools: Tools, *args: str) -> dict:
  done = tools.bash("gke/submit.sh", "--dry-run", *GKE, *args)
  assert done.returncode == 0, done.stderr
  (document,) = [d for d in yaml.safe_load_all(done.stdout) if d]
  return document


def job_spec(document: dict) -> dict:
  (job,) = document["spec"]["replicatedJobs"]
  return job["template"]["spec"]


def test_manifest_fits_the_schema(tools):
  jsonschema = pytest.importorskip("jsonschema", reason="pip install -r tests/requirements.txt")
  document = manifest(tools, "--topology=4x4", "--max-restarts=0", "--service-account=sa", "--namespace=ns")
  jsonschema.validate(document, JOBSET)
  assert "${" not in json.dumps(document), "the template is filled in"
  job_spec(document)["template"]["spec"]["restartPolicies"] = "Never"
  with pytest.raises(jsonschema.ValidationError, match="restartPolicies"):
    jsonschema.validate(document, JOBSET)


@pytest.mark.parametrize(
  ("kind", "topology", "chips", "hosts", "label"),
  [
    ("v6e", "4x4", 4, 4, "tpu-v6e-slice"),
    ("v5e", "2x4", 8, 1, "tpu-v5-lite-podslice"),
    ("v5p", "2x2x2", 4, 2, "tpu-v5p-slice"),
    ("v4", "2x4x4", 4, 8, "tpu-v4-podslice"),
    ("tpu7x", "2x2x1", 4, 1, "tpu7x"),
  ],
)
def test_manifest_has_one_pod_per_host(tools, kind, topology, chips, hosts, label):
  job = job_spec(manifest(tools, f"--type={kind}", f"--topology={topology}", f"--chips-per-host={chips}"))
  assert job["parallelism"] == job["completions"] == hosts
  spec = job["template"]["spec"]
  assert spec["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": label,
    "cloud.google.com/gke-tpu-topology": topology,
  }


def test_manifest_runs_the_program_on_the_bucket(tools):
  awkward = '--config.note="a" \\ & ${NAME} b'
  document = manifest(tools, "--topology=4x4", awkward)
  pod = job_spec(document)["template"]
  (container,) = pod["spec"]["containers"]
  assert container["args"] == ["train", "--distributed", f"--config={CONFIG}", "--workdir=/mnt/gcs/runs/a", awkward]
  starts = ["--config.mesh.fsdp=8", "--init-from=/mnt/gcs/runs/b", "--init-what=everything", "--profile"]
  other = job_spec(manifest(tools, "--topology=4x4", "--config=configs/lejepa_imagenet.py:vith", *starts))["template"]
  assert other["spec"]["containers"][0]["args"][2:] == [
    "--config=configs/lejepa_imagenet.py:vith",
    "--workdir=/mnt/gcs/runs/a",
    *starts,
  ]
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
  assert mounts.keys() == volumes.keys() and mounts["bucket"] == "/mnt/gcs"
  assert volumes["bucket"]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volumes["bucket"]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
  assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_manifest_exit_codes(tools):
  """75 is replaced without counting; 2 and 3 fail the Job, and by that the JobSet; the rest restarts and counts."""
  document = manifest(tools, "--topology=4x4")
  job = job_spec(document)
  name = job["template"]["spec"]["containers"][0]["name"]
  rules = {tuple(r["onExitCodes"]["values"]): r for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r}
  assert {codes: rule["action"] for codes, rule in rules.items()} == {(2, 3): "FailJob", (75,): "Ignore"}
  assert all(rule["onExitCodes"]["containerName"] == name for rule in rules.values())
  assert job["backoffLimit"] == 0
  (rule,) = document["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_submit_hands_the_manifest_to_kubectl(tools, tmp_path):
  tools.script(tools.folder / "kubectl", f'echo "$*" >{tmp_path}/args; cat >{tmp_path}/manifest')
  done = tools.bash("gke/submit.sh", *GKE, "--topology=4x4")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "args").read_text() == "apply -f -\n"
  assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest(tools, "--topology=4x4")


# The images: not built here, so read


def dockerfile() -> dict[str, list[tuple[str, str]]]:
  """Stage name -> its instructions, in order."""
  text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
  stages: dict[str, list[tuple[str, str]]] = {}
  for line in text.splitlines():
    if not line.strip() or line.startswith("#"):
      continue
    instruction, _, rest = line.partition(" ")
    assert instruction in {"FROM", "RUN", "COPY", "ENV", "ARG", "WORKDIR", "USER", "ENTRYPOINT"}, line
    if instruction == "FROM":
      assert (stage := re.fullmatch(r"(\S+) AS (\S+)", rest)), line
      assert stage[1] in stages or stage[1] == "python:3.12-slim", f"{stage[1]} is not a stage above"
      stages[name := stage[2]] = [("FROM", stage[1])]
    else:
      stages[name].append((instruction, rest))
  return stages


def lineage(stages: dict, name: str) -> list[tuple[str, str]]:
  parent = stages[name][0][1]
  return (lineage(stages, parent) if parent in stages else []) + stages[name]


@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_image_installs_the_pins_and_runs_the_program_not_as_root(target):
  steps = lineage(dockerfile(), target)
  values = lambda instruction: [rest for name, rest in steps if name == instruction]
  extra = {"cpu": "", "cuda": ' "jax[${JAX_EXTRA}]"', "tpu": ' "jax[tpu]"'}[target]
  assert f"pip install -r requirements.txt{extra}" in values("RUN")
  assert values("USER") == ["jepa"] and json.loads(values("ENTRYPOINT")[0]) == ["bash", "launch/container.sh"]
  assert any(f"JEPA_PLATFORM={target}" in rest for rest in values("ENV"))
  copied = [rest.split()[0] for rest in values("COPY")]
  assert copied == ["requirements.txt", "launch", "configs", "jepa_jax"], "code after requirements: layers are kept"
  assert all((ROOT / path).exists() for path in copied)
  allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
  assert set(copied) == set(allowed)


def test_the_cpu_image_is_the_default():
  assert list(dockerfile())[-1] == "cpu"


def test_container_runs_the_program_as_its_own_process(tools):
  """`exec`: the program has the process id that the container's init gets, and so its SIGTERM."""
  tools.script(tools.folder / "python", 'echo "$$ $JAX_PLATFORMS $*"')
  running = tools.start("container.sh", "train", "--config=c", JEPA_PLATFORM="tpu")
  assert running.communicate()[0] == f"{running.pid} tpu,cpu -m jepa_jax train --config=c\n"


def test_docker_dry_run(tools):
  build, push = dry_run(tools, "docker.sh", "--push", "cuda", "here/image:1", JAX_EXTRA="cuda12")
  assert build == (
    "docker build --platform=linux/amd64 --target=cuda --tag=here/image:1 --build-arg=JAX_EXTRA=cuda12 ."
  )
  assert push == "docker push here/image:1"
