"""Several processes: start, barriers, the shared folder, preemption, and the end when one of them is lost.

What JAX does by itself (seen with CPU processes over gloo, JAX 0.10.2 and 0.12.0), and why this room exists:
- A coordinator that cannot be reached, or a process that never comes: the C++ runtime aborts (status 134, a stack
  trace) 5 s after the time-out and names neither the address nor the process.
- SIGTERM is swallowed from `jax.distributed.initialize` on, whether or not the program ever asks for it.
- A process killed: the others' collective raises at once, naming a port; then they wait in the shutdown barrier until
  the heartbeat time-out (100 s) and abort. The coordinator killed: the others abort within 0.2 s.
- A process that hangs, or one that ends with an error of its own: the others wait inside the collective.

So every process keeps one TCP connection to process 0. They meet on the coordinator's port before JAX takes it over
(the address, the ids and the number of processes are checked there, with errors a person can act on), and keep the
connection as a heartbeat: a closed one means "killed" within milliseconds, a silent one "hangs" after `heartbeat_s`.
Process 0 tells the others, and each prints who was lost and ends with EXIT_PEER_LOST, whatever its main thread is
stuck in. Barriers and agreements go through JAX's coordination service, never through collectives.
"""

from jepa_jax.distributed.agreement import barrier as barrier
from jepa_jax.distributed.agreement import check_same as check_same
from jepa_jax.distributed.agreement import check_shared as check_shared
from jepa_jax.distributed.agreement import from_all as from_all
from jepa_jax.distributed.agreement import from_primary as from_primary
from jepa_jax.distributed.preemption import EXIT_PREEMPTED as EXIT_PREEMPTED
from jepa_jax.distributed.preemption import Preempted as Preempted
from jepa_jax.distributed.preemption import Preemption as Preemption
from jepa_jax.distributed.start import abandon as abandon
from jepa_jax.distributed.start import initialise as initialise
from jepa_jax.distributed.start import is_primary as is_primary
from jepa_jax.distributed.start import num_processes as num_processes
from jepa_jax.distributed.start import process_id as process_id
from jepa_jax.distributed.start import shutdown as shutdown
from jepa_jax.distributed.watchdog import EXIT_PEER_LOST as EXIT_PEER_LOST
