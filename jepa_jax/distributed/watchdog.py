"""The watchdog: who is lost, said by name, and the end of this process."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from typing import Any

from jepa_jax.distributed.meeting import Link

EXIT_PEER_LOST = 76  # another process was lost; start all again: they resume from the newest checkpoint
_FOR_GOOD = (2, 3)  # bad input, a diverged loss: where one process ends so all do, since another start cannot help
POLL_S = 0.5  # how often the watchdog beats and looks
FAREWELL_S = 3.0  # how long process 0 outlives the others: its end makes JAX abort those still there


class Watchdog(threading.Thread):
  """Ends this process, with a line that says why, when another one is lost.

  Process 0 holds a link to every process, the others hold one to process 0, which tells them about each other.
  """

  def __init__(self, links: dict[int, Link], process: int, num: int, heartbeat_s: float):
    super().__init__(name="jepa_jax watchdog", daemon=True)
    self._links, self._process, self._num, self._heartbeat_s = links, process, num, heartbeat_s
    self._selector = selectors.DefaultSelector()
    self._last_poll_s = time.monotonic()
    self._leaving = self._failing = self._ending = False
    self._all_ended, self._heard_of_failure = threading.Event(), threading.Event()
    for link in links.values():
      link.heard_s = self._last_poll_s
      self._selector.register(link.sock, selectors.EVENT_READ, link)

  def run(self) -> None:
    while not self._all_ended.is_set():
      self._poll(POLL_S)

  def say_goodbye(self) -> None:
    """Returns when all processes have said goodbye."""
    self._leaving = True
    if self._process:
      self._links[0].send(bye="")
    while self.is_alive() and not self._all_ended.wait(1.0):
      pass

  def announce_failure(self, status: int, reason: str) -> None:
    """Returns when the others know with which status this one ends, and why.

    Waits first: an error inside a collective most often means that a peer was lost.
    """
    self._failing = True
    time.sleep(1.0)
    self._ending = True
    if self._process:
      self._links[0].send(bye=reason[:1000] or "no reason", status=status)
      self._heard_of_failure.wait(FAREWELL_S)
    else:
      self._tell(lost=0, why=f"it ended with an error: {reason[:1000]}", status=status)
      deadline_s = time.monotonic() + FAREWELL_S
      while time.monotonic() < deadline_s and not all(link.closed for link in self._links.values()):
        time.sleep(0.05)

  def _poll(self, wait_s: float) -> None:
    """Reads what has come within wait_s, answers it, and looks for links that have been silent for too long."""
    for key, _ in self._selector.select(wait_s):
      link: Link = key.data
      messages = link.read()
      if messages is None:
        self._selector.unregister(link.sock)
        link.closed = True
        self._heard_of_failure.set()
        if not link.said_goodbye:
          self._lost(link.process, "its connection closed: it was killed or has crashed")
      for message in messages or ():
        self._receive(link, message)
    now_s = time.monotonic()
    if now_s - self._last_poll_s > 4 * POLL_S + 1:  # this process was stopped: the others' beats may still be unread
      for link in self._links.values():
        link.heard_s = now_s
    self._last_poll_s = now_s
    self._tell(beat=1)
    for link in self._links.values():
      if now_s - link.heard_s > self._heartbeat_s and not link.said_goodbye:
        self._lost(link.process, f"no sign of life for {self._heartbeat_s} s: it hangs, or its host is gone")
    if self._process == 0 and self._leaving and all(link.said_goodbye for link in self._links.values()):
      self._tell(end=1)
      self._all_ended.set()

  def _receive(self, link: Link, message: dict[str, Any]) -> None:
    if "bye" in message:
      link.said_goodbye = True
      if message["bye"]:
        self._lost(link.process, f"it ended with an error: {message['bye']}", message["status"])
    elif "end" in message:
      self._all_ended.set()
    elif message.get("lost") == self._process:
      self._heard_of_failure.set()
    elif "lost" in message:
      self._lost(message["lost"], message["why"], message["status"], message.get("host"))

  def _tell(self, **message: Any) -> None:
    for link in self._links.values():
      if not link.closed:
        link.send(**message)

  def _lost(self, process: int, why: str, status: int = 0, host: str | None = None) -> None:
    """Says who was lost and ends this process; not where it is ending already with an error of its own.

    status: with which the other one ended after an error; 0: it vanished.
    """
    if self._ending:
      return
    host = host or self._links[process].host
    if self._process == 0:
      self._tell(lost=process, why=why, host=host, status=status)
    if status and self._failing:
      return
    self._ending = True
    own = status if status in _FOR_GOOD else EXIT_PEER_LOST
    text = (
      f"\njepa_jax: process {process} (host {host}) was lost: {why}. This process ({self._process} of {self._num}) "
      f"ends with status {own}"
    )
    if own == EXIT_PEER_LOST:
      text += ". Start all processes again with the same command: they resume from the newest checkpoint.\n"
    else:
      text += ", too: start all again when that is mended.\n"
    with contextlib.suppress(OSError):  # stderr may be a file on a full disk
      os.write(2, text.encode())  # not through sys.stderr: the main thread may hold its lock
    deadline_s = time.monotonic() + FAREWELL_S
    others = [link for i, link in self._links.items() if i != process]
    while not all(link.closed for link in others) and time.monotonic() < deadline_s:
      self._poll(0.05)
    os._exit(own)
