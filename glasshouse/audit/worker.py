"""The technique's own process: `python -m glasshouse.audit.worker DESCRIPTOR`, started by the game master only.

It shuts itself in before it imports NumPy or the technique, then runs the technique and sends back its outcome.
It never sees the model, the seal, the specimen's folder or the code that grew it.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import resource
import socket
import sys
import traceback
from typing import Any

from glasshouse.audit.isolation import shut_in


def main() -> None:
    """Serve one technique on one case, then end."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    readable, writable = sys.stdin.readline().rstrip("\n").split("\t"), [os.getcwd()]
    isolation = shut_in(readable, writable)
    sys.path[:] = [readable[0]]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))

    from glasshouse.audit.wire import send

    send(channel, {"ready": dataclasses.asdict(isolation)})
    serve(channel)


def serve(channel: socket.socket) -> None:
    """Wait for one task, run its technique, send the outcome or the error."""
    from glasshouse.audit.cases import Case
    from glasshouse.audit.wire import receive, send

    task, _ = receive(channel)
    if "try_to_open" in task:
        return send(channel, {"opened": [path for path in task["try_to_open"] if can_open(path)]})
    try:
        run = getattr(importlib.import_module(task["module"]), task["function"])
        send(channel, {"imported": True})
        case = Case(
            channel=lambda call, args, arrays: ask(channel, call, args, arrays),
            id=task["id"],
            offers=frozenset(task["offers"]),
            sites=tuple(task["sites"]),
            vocabulary_size=task["vocabulary_size"],
            has_chat=task["has_chat"],
            extras=task["extras"],
        )
        outcome = run(case, task["seed"])
        send(channel, {"outcome": dataclasses.asdict(outcome)})
    except Exception as error:
        send(channel, {"failed": type(error).__name__, "message": str(error), "trace": traceback.format_exc(limit=-6)})


def can_open(path: str) -> bool:
    """Whether this process can read the file, or list the folder, at `path`."""
    try:
        if os.path.isdir(path):
            return bool(os.listdir(path)) or True
        with open(path, "rb") as stream:
            stream.read(1)
        return True
    except OSError:
        return False


def ask(channel: socket.socket, call: str, args: dict[str, Any], arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put one question to the game master. Raises `AccessDenied`, `BudgetSpent`, `BadValue` or another `GlasshouseError`."""
    from glasshouse import errors
    from glasshouse.audit.wire import receive, send

    send(channel, {"call": call, "args": args}, arrays)
    header, answer = receive(channel)
    if "error" in header:
        kinds = {"AccessDenied": errors.AccessDenied, "BudgetSpent": errors.BudgetSpent, "BadValue": errors.BadValue}
        raise kinds.get(header["error"], errors.GlasshouseError)(header["message"])
    return header, answer


if __name__ == "__main__":
    main()
