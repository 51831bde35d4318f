"""Eight fake CPU devices for every test: sharded = single-device is checked everywhere."""

import gc
import importlib.metadata
import os

from jepa_jax.faked_devices import give_threads

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without LLVM's optimisation compiling takes half of the time, and with the
# older emitters of fusions, where this JAX has them, half of that. Tests marked `optimised` are without all this.
_OPTIMISED = "JEPA_JAX_TEST_OPTIMISED" in os.environ
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
if not _OPTIMISED:
  _FLAGS |= {"--xla_backend_optimization_level": "0", "--xla_llvm_disable_expensive_passes": "true"}
  if importlib.metadata.version("jax").startswith("0.10."):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
give_threads()
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # no line numbers in programs: a sixth of lowering and compiling
gc.set_threshold(200_000, 50, 50)  # tracing makes many small objects that live on; looking through them takes time

import atexit  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# Many tests start the same small run again: its program is compiled once per session, in one cache of this session's
# own for all workers and the processes that they start. pytest-xdist's workers inherit its name from the first process.
_CACHE = os.environ.get("JEPA_JAX_TEST_CACHE")
if not _CACHE:
  _CACHE = os.environ["JEPA_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="jepa_jax_test_cache_")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items):
  """Long files first: the workers, which take whole files, then end together. `optimised` tests are the longest."""
  weights = {}
  for item in items:
    weight = 100 if item.get_closest_marker("optimised") else 1 if item.get_closest_marker("slow") else 0.01
    weights[item.path] = weights.get(item.path, 0) + weight
  items.sort(key=lambda item: -weights[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
  """Runs a test marked `optimised` in a process of its own, where programs are compiled as users compile them."""
  if _OPTIMISED or not pyfuncitem.get_closest_marker("optimised"):
    return None
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.startswith("PYTEST_")}
  environment |= {"JEPA_JAX_TEST_OPTIMISED": "1"}
  command = [sys.executable, "-m", "pytest", "-n", "0", pyfuncitem.nodeid]
  done = subprocess.run(command, env=environment, cwd=pyfuncitem.config.rootpath, capture_output=True, text=True)
  assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
  return True
