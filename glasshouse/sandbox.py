"""Sandbox: run a function that a model wrote, in another process, and bring plain JSON values back.

Layers: a whitelist of syntax and builtins (no import, no underscore attribute), a forked process with resource limits and no new
files, a network namespace of its own where the kernel grants one to this user, a wall-clock limit, and a nonce on the verdict.
`Verdict.layers` says which of them were in force. Not here: a shell, files, or any code past the whitelist; that needs a container.
The file is also the program of the process that forks (it runs isolated, imports the standard library only, never torch).
"""

from __future__ import annotations

import ast
import atexit
import ctypes
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SOURCE_LIMIT = 20_000
"""Characters of source that are looked at."""
REPLY_LIMIT = 1 << 20
"""Bytes that one run may answer with."""

_NODES = (
    "Module FunctionDef arguments arg Return Assign AugAssign For While If Expr Name Load Store Constant List Tuple Dict Set ListComp "
    "DictComp SetComp GeneratorExp comprehension BinOp UnaryOp BoolOp Compare IfExp Call Subscript Slice Attribute Lambda Starred keyword "
    "Break Continue Pass Add Sub Mult Div FloorDiv Mod Pow LShift RShift BitOr BitXor BitAnd And Or Not UAdd USub Invert Eq NotEq Lt LtE "
    "Gt GtE Is IsNot In NotIn"
)
_BUILTINS = (
    "abs all any bool dict divmod enumerate filter float frozenset int isinstance len list map max min pow range reversed round set sorted str sum tuple zip"
)
_METHODS = (
    "append extend insert pop remove sort reverse index count copy clear add discard update union intersection difference get keys values "
    "items setdefault upper lower title strip lstrip rstrip split join replace startswith endswith find isdigit isalpha isupper islower "
    "capitalize swapcase zfill"
)


@dataclass(frozen=True)
class Verdict:
    """What a run gave."""

    values: tuple[Any, ...]
    """One plain JSON value a call; None where that call raised (see `errors`)."""
    errors: tuple[str, ...]
    """One sentence a call, empty where it returned; a single one when nothing could run."""
    layers: tuple[str, ...]
    """The layers of isolation that were in force."""
    seconds: float
    """Wall-clock time."""

    @property
    def ran(self) -> bool:
        """True when the function was defined and every call returned."""
        return bool(self.values) and not any(self.errors)


def run_function(source: str, calls: Sequence[Sequence[Any]], name: str = "solve", seconds: float = 2.0, memory: int = 256 << 20) -> Verdict:
    """Define `name` from `source` in a fresh process and call it once for each list of arguments in `calls`.

    Arguments and results are plain JSON values (tuples come back as lists). `seconds` bounds the whole run, `memory` its bytes.
    Bad source, a crash, or a limit is an answer and stands in `Verdict.errors`; a machine that cannot fork raises `BadValue`.
    """
    start = time.perf_counter()
    nonce = secrets.token_hex(16)
    request = {
        "nonce": nonce,
        "source": source[: SOURCE_LIMIT + 1],
        "calls": list(calls),
        "name": name,
        "seconds": seconds,
        "memory": memory,
    }
    reply = _server().ask(request, seconds + 5.0)
    if reply.get("nonce") != nonce:
        error = reply.get("error") or "the process ended without its verdict"
        return Verdict((), (error,), tuple(reply.get("layers", ())), time.perf_counter() - start)
    return Verdict(tuple(reply["values"]), tuple(reply["errors"]), tuple(reply["layers"]), time.perf_counter() - start)


class _Server:
    """The parent's end of the forking process: one request, one reply, in turn."""

    def __init__(self) -> None:
        from glasshouse.errors import BadValue

        self.owner = os.getpid()
        self.lock = threading.Lock()
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(__file__)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BadValue(f"The sandbox needs to start a Python process, and this machine refused: {error}.") from error
        atexit.register(self.close)

    def ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """Send a request; after `patience` seconds without a reply, or a broken pipe, the process is ended and the reply says so."""
        with self.lock:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                ready = select.select([self.process.stdout], [], [], patience)[0]
                line = self.process.stdout.readline() if ready else b""
            except OSError:
                line = b""
            if not line:
                self.close()
                return {"error": "the sandbox process did not answer and was ended"}
            return json.loads(line)

    def usable(self) -> bool:
        """True while the process is alive and is this process's own (not a parent's, after a fork)."""
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self.owner == os.getpid() and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


_current: list[_Server] = []
_starting = threading.Lock()


def _server() -> _Server:
    with _starting:
        if not _current or not _current[0].usable():
            _current[:] = [_Server()]
        return _current[0]


# ---- below: the process that forks, and its children ----


def _serve() -> None:
    """Read requests, one JSON object a line; answer each from a forked child."""
    network = "no-network" if _leave_network() else ""
    layers = [layer for layer in ("whitelist", "process", "limits", network) if layer]
    for line in sys.stdin.buffer:
        request = json.loads(line)
        reply = _fork_and_wait(request) or {}
        sys.stdout.buffer.write(json.dumps({**reply, "layers": layers}).encode() + b"\n")
        sys.stdout.buffer.flush()


def _leave_network() -> bool:
    """Move into user and network namespaces of our own (CLONE_NEWUSER | CLONE_NEWNET); False where the kernel refuses."""
    try:
        return ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000) == 0
    except (OSError, AttributeError):
        return False


def _fork_and_wait(request: dict[str, Any]) -> dict[str, Any] | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be_child(request, writing)
    os.close(writing)
    deadline, parts, size = time.monotonic() + request["seconds"], [], 0
    late = False
    while size <= REPLY_LIMIT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            late = True
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late:
        return {"error": f"took longer than {request['seconds']} s"}
    try:
        return json.loads(b"".join(parts))
    except ValueError:
        return {"error": f"the process ended without its verdict (status {status})"}


def _be_child(request: dict[str, Any], writing: int) -> None:
    """Limit this process, run the request, write the verdict, end. Never returns."""
    import resource

    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        seconds = math.ceil(request["seconds"]) + 1
        limits = {
            resource.RLIMIT_CPU: seconds,
            resource.RLIMIT_AS: request["memory"],
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_NOFILE: 0,
        }
        for kind, limit in limits.items():
            resource.setrlimit(kind, (limit, limit))
        try:
            values, errors = _call(request["source"], request["name"], request["calls"])
        except Exception as error:
            values, errors = [], [f"{type(error).__name__}: {error}"[:200]]
        reply = json.dumps({"nonce": request["nonce"], "values": values, "errors": errors}, allow_nan=False).encode()
        while reply:
            reply = reply[os.write(writing, reply) :]
    finally:
        os._exit(0)


def _call(source: str, name: str, calls: list[list[Any]]) -> tuple[list[Any], list[str]]:
    """Results and errors of all calls, after the whitelist."""
    import builtins

    tree = check_source(source)
    space: dict[str, Any] = {"__builtins__": {item: getattr(builtins, item) for item in _BUILTINS.split()}}
    exec(compile(tree, "<answer>", "exec"), space)
    if not callable(space.get(name)):
        raise ValueError(f"the source defines no function {name!r}")
    values: list[Any] = []
    errors: list[str] = []
    for arguments in calls:
        try:
            values.append(plain(space[name](*json.loads(json.dumps(arguments)))))
            errors.append("")
        except Exception as error:
            values.append(None)
            errors.append(f"{type(error).__name__}: {error}"[:200])
    return values, errors


def check_source(source: str) -> ast.Module:
    """The syntax tree, if every node, name and method is on the whitelist. Raises `ValueError` or `SyntaxError` naming what is not."""
    if len(source) > SOURCE_LIMIT:
        raise ValueError(f"the source has more than {SOURCE_LIMIT} characters")
    tree = ast.parse(source)
    nodes, methods = set(_NODES.split()), set(_METHODS.split())
    for node in ast.walk(tree):
        kind = type(node).__name__
        if kind not in nodes:
            raise ValueError(f"{kind} is not allowed")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise ValueError(f"the name {node.id!r} is not allowed")
        if isinstance(node, ast.Attribute) and node.attr not in methods:
            raise ValueError(f"the attribute {node.attr!r} is not allowed")
        if isinstance(node, ast.FunctionDef) and (node.decorator_list or node.name.startswith("_")):
            raise ValueError("decorators and names that begin with an underscore are not allowed")
    return tree


def plain(value: Any, depth: int = 20) -> Any:
    """The value as plain JSON, judged by exact type (tuples become lists). Raises `TypeError` for anything else."""
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if depth and kind in (list, tuple):
        return [plain(item, depth - 1) for item in value]
    if depth and kind is dict and all(type(key) is str for key in value):
        return {key: plain(item, depth - 1) for key, item in value.items()}
    raise TypeError(f"the result holds a {kind.__name__} that is not plain JSON")


if __name__ == "__main__":
    _serve()
