"""Eight fake CPU devices for every test: sharded = single-device is checked everywhere."""

import gc
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: without LLVM's optimisation compiling takes half of the time. The emitters of
# fusions stay on: off, at level 0 of JAX 0.10.2, views differ in the last bits with the number of devices.
_FLAGS = {
  "--xla_force_host_platform_device_count": "8",
  "--xla_backend_optimization_level": "0",
  "--xla_llvm_disable_expensive_passes": "true",
}
for _flag, _value in _FLAGS.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
gc.set_threshold(200_000, 50, 50)  # tracing makes many small objects that live on; looking through them takes time

import atexit  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402

# Many tests start the same small run again: its program is compiled once per session, in one cache of this session's
# own for all workers and the processes that they start. pytest-xdist's workers inherit its name from the first process.
_CACHE = os.environ.get("JEPA_JAX_TEST_CACHE")
if not _CACHE:
  _CACHE = os.environ["JEPA_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="jepa_jax_test_cache_")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
