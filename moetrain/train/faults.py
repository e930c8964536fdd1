"""Named places at which a test makes a rank fail.

``MOETRAIN_FAULT=point:rank:step:action`` arms one of them, e.g. ``ckpt.rename:0:20:kill``; step ``*`` is any
step. Actions: ``kill`` (SIGKILL to itself), ``stop`` (SIGSTOP), ``exit`` (status 1, without any clean-up),
``raise`` (:class:`FaultError`). Without the variable a point does nothing.

Points so far: ``step.begin`` (before an optimizer step), ``ckpt.begin`` (before anything is written),
``ckpt.shard`` (a rank's file is written, the index is not), ``ckpt.manifest`` (rank 0; all files but the manifest
are written), ``ckpt.rename`` (rank 0; complete but not yet under its name), ``ckpt.prune`` (rank 0; an old
checkpoint is hidden but not yet deleted), ``event.spawn`` (experts are made, but the run does not have them yet).
"""

from __future__ import annotations

import os
import signal

from moetrain.parallel.ranks import Ranks

VARIABLE = "MOETRAIN_FAULT"
ACTIONS = ("kill", "raise", "stop", "exit")


class FaultError(RuntimeError):
    """Raised by an armed point whose action is ``raise``."""


def point(name: str, step: int | None = None) -> None:
    """Fails here if this point is armed for this rank and step. Raises ValueError for a malformed variable."""
    armed = os.environ.get(VARIABLE)
    if not armed:
        return
    fields = armed.split(":")
    if len(fields) != 4 or fields[3] not in ACTIONS:
        raise ValueError(f"{VARIABLE}={armed!r} must be point:rank:step:action with an action of {', '.join(ACTIONS)}")
    where, rank, at, action = fields
    if where == name and rank == str(Ranks.detect().rank) and at in ("*", str(step)):
        _fail(action, f"{name} at step {step} on rank {rank}")


def _fail(action: str, place: str) -> None:
    if action == "raise":
        raise FaultError(place)
    if action == "exit":
        os._exit(1)
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
