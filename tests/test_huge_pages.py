"""The command asks for huge pages where they can help, once, and leaves everything else as it was."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_jax import huge_pages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def supported(monkeypatch, tmp_path):
  """A Linux with a glibc and a kernel that give huge pages to who asks; returns the kernel's file."""
  kernel = tmp_path / "enabled"
  kernel.write_text("always [madvise] never\n")
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.35"))
  monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
  monkeypatch.setattr(sys, "gettrace", lambda: None)
  for name in ("GLIBC_TUNABLES", "JEPA_KEEP_MALLOC"):
    monkeypatch.delenv(name, raising=False)
  return kernel


def test_what_is_set_is_kept_and_asked_for_once(supported):
  assert huge_pages.wanted({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
  both = huge_pages.wanted({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
  assert both == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
  assert huge_pages.wanted(both) is None  # started again, it goes on
  assert huge_pages.wanted({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None  # the user's own choice
  assert huge_pages.wanted({"JEPA_KEEP_MALLOC": "1"}) is None


@pytest.mark.parametrize("kernel", ["[always] madvise never", "always madvise [never]"])
def test_where_the_kernel_asks_nobody_nothing_is_done(supported, kernel):
  supported.write_text(kernel)
  assert huge_pages.wanted({}) is None
  supported.unlink()
  assert huge_pages.wanted({}) is None


@pytest.mark.parametrize("library", [("glibc", "2.34"), ("musl", "1.2"), ("", ""), ("glibc", "strange")])
def test_another_library_is_left_alone(supported, monkeypatch, library):
  monkeypatch.setattr(platform, "libc_ver", lambda: library)
  assert huge_pages.wanted({}) is None


def test_other_systems_are_left_alone(supported, monkeypatch):
  monkeypatch.setattr(sys, "platform", "darwin")
  assert huge_pages.wanted({}) is None


def test_the_same_command_is_started(supported, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "jepa_jax", "train", "--config=a b.py"])
  monkeypatch.setattr(sys, "argv", ["__main__.py", "train", "--config=a b.py"])
  seen = []
  huge_pages.restart_with_huge_pages(lambda *args: seen.append(args))
  ((program, arguments, environment),) = seen
  assert program == sys.executable and arguments[0] == sys.executable
  assert arguments[1:] == ["-X", "dev", "-m", "jepa_jax", "train", "--config=a b.py"]
  assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
  monkeypatch.setattr(sys, "gettrace", lambda: print)  # a debugger
  huge_pages.restart_with_huge_pages(lambda *args: seen.append(args))
  assert len(seen) == 1


@pytest.mark.parametrize(
  "command, read",
  [
    (["python", "launcher.py"], ["__main__.py", "train"]),  # runpy, with arguments of its own
    (["python", "launcher.py", "-m", "jepa_jax"], ["launcher.py", "-m", "jepa_jax"]),
    (["python", "-m", "coverage", "run", "-m", "jepa_jax", "train"], ["__main__.py", "train"]),
    (["python", "-c", "import runpy", "train"], ["-c", "train"]),
    ([], ["__main__.py"]),
  ],
)
def test_what_somebody_else_started_is_theirs(supported, monkeypatch, command, read):
  monkeypatch.setattr(sys, "orig_argv", command)
  monkeypatch.setattr(sys, "argv", read)
  huge_pages.restart_with_huge_pages(lambda *args: pytest.fail("started again"))


def test_where_the_system_does_not_let_us_the_command_goes_on(supported, monkeypatch):
  monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "jepa_jax"])
  monkeypatch.setattr(sys, "argv", ["__main__.py"])
  tried = []

  def refused(*args):
    tried.append(args)
    raise OSError(7, "Argument list too long")

  huge_pages.restart_with_huge_pages(refused)
  assert len(tried) == 1


MODULE = """
import os, sys
import importlib.util
path = os.path.join(os.environ["REPOSITORY"], "jepa_jax", "huge_pages.py")
spec = importlib.util.spec_from_file_location("jepa_jax.huge_pages", path)
huge_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(huge_pages)
huge_pages.restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


def test_a_process_stays_the_same_one_and_runs_once(monkeypatch, tmp_path):
  """A package of that name, whose command says who it is."""
  (tmp_path / "jepa_jax").mkdir()
  (tmp_path / "jepa_jax" / "__main__.py").write_text(MODULE)
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  monkeypatch.delenv("JEPA_KEEP_MALLOC", raising=False)
  expected = (huge_pages.wanted({}) or {}).get("GLIBC_TUNABLES")
  environment = os.environ | {"REPOSITORY": str(ROOT)}
  command = [sys.executable, "-m", "jepa_jax", "a b", "$c"]
  process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
  out, _ = process.communicate(timeout=60)
  assert out == f"{process.pid} {expected} ['a b', '$c']\n" and process.returncode == 0
