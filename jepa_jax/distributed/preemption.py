"""Stopping when asked to: SIGTERM, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the preemption service has no public door that takes call counts

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: everything is saved; start again to go on


class Preempted(Exception):
  """SIGTERM or Ctrl-C: the state was saved, and the same command goes on from there. Exit status 75."""


class Preemption:
  """Within it, SIGTERM and the first Ctrl-C only ask for a stop: `reached(step)` says after which step to save and end.

  Several processes agree on that step through JAX's preemption service, which SIGTERM to any one of them starts. It
  counts calls, not steps: SIGTERM before the first call (compiling can take minutes) means the first call, whereas
  with the numbers of a resumed run it would mean step 1, which never comes.

  The service's manager is taken out of JAX's global state: Orbax asks what it finds there at every save, with the real
  step. Fed by two counts, all processes could agree on a number that we had passed already, and train on for ever.
  """

  def __init__(self):
    self.asked = False  # one process only: with several, the service knows
    self._first_step: int | None = None
    self._previous: dict[int, Any] = {}
    self._manager: Any = None

  def __enter__(self) -> Preemption:
    main = threading.current_thread() is threading.main_thread()  # only there can handlers be set
    if main:
      self._previous = {s: signal.getsignal(s) or signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGINT)}
      signal.signal(signal.SIGINT, self._on_interrupt)
    state = jax_distributed.global_state
    if state.client is None and main:
      signal.signal(signal.SIGTERM, self._on_terminate)
    elif state.client is not None and state.preemption_sync_manager is None:
      jax.config.update("jax_enable_preemption_service", True)
      state.initialize_preemption_sync_manager()  # takes SIGTERM over, in C++; it looks once a second
      self._manager, state.preemption_sync_manager = state.preemption_sync_manager, None
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._manager is not None:
      self._manager.shutdown()
      self._manager = None
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def reached(self, step: int) -> bool:
    """Returns whether to save and end after `step`, the same in all processes. To be asked after every step."""
    if self._first_step is None:
      self._first_step = step
    if self._manager is not None and not self.asked:
      self.asked = self._manager.reached_sync_point(step - self._first_step + 1)
    return self.asked

  def _on_terminate(self, *_: object) -> None:
    self.asked = True

  def _on_interrupt(self, *_: object) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one stops at once
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
      os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once, without.\n")
    signal.raise_signal(signal.SIGTERM)
