"""A worker process of `runs.pool`: makes one artifact after another until its driver is gone.

Started as ``python -m rlhfscale.runs.worker DESCRIPTOR DRIVER_PID``, with one thread for every numerical library set in
its environment. It is a plain subprocess and not one of multiprocessing: it never imports the driver's ``__main__``, so
it works the same below a Jupyter kernel, a script without a main guard, and a test.
"""

import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from rlhfscale.models.allocator import keep_freed_memory
from rlhfscale.runs import team
from rlhfscale.runs.spec import Spec
from rlhfscale.runs.store import Store, StoreError


def make(spec: Spec, store: Store, together: Callable[..., None] | None = None) -> str:
    """Make one artifact under its lock; ``"done"``, or ``"cached"`` where another process has made it meanwhile.

    Args:
        together: has several processes call the stage's function; by default as many of this machine as the spec has
            GPUs, see `team`.
    """
    with store.writing(), store.lock(spec.key):
        if store.verify(spec.key):
            store.share([spec.key])
            return "cached"
        for parent in spec.parents:
            if not store.verify(parent.key):  # the plan found it, and it was found damaged since
                _make_again(parent, spec, store)
        module, _, name = spec.runner.partition(":")
        run = together or team.of(spec.needs) or getattr(importlib.import_module(module), name)
        inputs = {parent.key: store.open(parent.key) for parent in spec.parents}
        with store.create(spec) as folder:
            run(spec, inputs, folder)
    return "done"


def _make_again(parent: Spec, child: Spec, store: Store) -> None:
    """Make a parent on the way to its child, where what the child was given is enough for it."""
    if parent.needs.gpus > child.needs.gpus or parent.needs.machines > 1:
        raise RuntimeError(f"{parent.title} was found damaged and takes more GPUs than this: run again to make both")
    make(parent, store)


def attempt(spec: Spec, store: Store, together: Callable[..., None] | None = None) -> tuple[str, float, str, str]:
    """Make a spec: status, seconds, message and traceback (see `pool.Outcome`); all output goes to the spec's log."""
    keep_freed_memory()
    start, message, trace = time.perf_counter(), "", ""
    try:
        with store.writing():
            print_to(store.root / "logs" / f"{spec.key}.log")
        status = make(spec, store, together)
    except StoreError as error:
        status, message, trace = "store", str(error), traceback.format_exc()
    except team.MachineLost as error:
        status, message = "lost", str(error)
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        status, message, trace = "failed", f"{type(error).__name__}: {text[0]}", traceback.format_exc()
    with suppress(OSError):  # a full disk: the driver has the traceback all the same
        print(trace, end="", file=sys.stderr, flush=True)
    return status, time.perf_counter() - start, message, trace


def print_to(path: Path) -> None:
    """Have all output of this process go to a file, which is emptied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def serve(connection: Connection, store: Store) -> None:
    """Receive a spec, make it, send how that ended, and so on."""
    while True:
        connection.send(attempt(connection.recv(), store))


def _terminate(*_: object) -> None:
    raise SystemExit(143)  # unwinds through Store.create, which deletes the half-made artifact


def main() -> None:
    faulthandler.enable()
    signal.signal(signal.SIGTERM, _terminate)
    descriptor, driver = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=team.exit_with, args=(driver,), daemon=True).start()
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # the driver has closed its end: no more work
        serve(connection, Store(connection.recv()))


if __name__ == "__main__":
    main()
