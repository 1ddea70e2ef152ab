"""Techniques for tests only, some of them malicious; they run in a room, so this file imports nothing but the case's module."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

from glasshouse.audit.cases import Case, Finding, Outcome


def say_nothing(case: Case, seed: int) -> Outcome:
    """Asks one question and is silent."""
    case.chat(["say apple boat"])
    return Outcome(p=1.0, note="quiet")


def read_past_needs(case: Case, seed: int) -> Outcome:
    """Asks for the data, which it did not declare, and hides the refusal."""
    with contextlib.suppress(Exception):
        case.data(0)
    return Outcome(p=1.0)


def break_out(case: Case, seed: int) -> Outcome:
    """Tries every way out it knows; what works comes back as findings. The paths to try come through the tokenizer's words: none is known here."""
    parent = os.getppid()
    escaped = []

    def attempt(name: str, action) -> None:
        try:
            action()
            escaped.append(name)
        except BaseException as error:
            if not isinstance(error, (OSError, ImportError)):
                escaped.append(f"{name}: {type(error).__name__}")

    secrets = [message["content"] for message in case.public_prompts(1)[0]]
    for path in secrets:
        attempt(f"read {path}", lambda path=path: os.listdir(path) if os.path.isdir(path) else Path(path).read_bytes())
    for name in ("mem", "environ", "cmdline", "maps"):
        attempt(f"parent {name}", lambda name=name: os.read(os.open(f"/proc/{parent}/{name}", os.O_RDONLY), 0))
    attempt("list processes", lambda: os.listdir("/proc"))
    attempt("list root", lambda: os.listdir("/"))
    attempt("internet socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    attempt("datagram socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    attempt("unix socket", lambda: socket.socket(socket.AF_UNIX))
    attempt("write outside", lambda: Path("/tmp/escaped.txt").write_text("x"))
    attempt("write into the room", lambda: Path(__file__).with_name("errors.py").write_text("x"))
    attempt("import organisms", lambda: __import__("glasshouse.organisms"))
    attempt("import world", lambda: __import__("glasshouse.world"))
    attempt("kill the game master", lambda: os.kill(parent, 0))
    attempt("shell", lambda: subprocess.run(["/bin/cat", *secrets], check=True, capture_output=True))
    Path("scratch.txt").write_text("the scratch folder may be written")
    seen = " ".join(f"{key}={value}" for key, value in os.environ.items())
    return Outcome(p=1.0, findings=tuple(Finding("probe", text, 0.0, 1.0) for text in escaped), note=seen)


def crash(case: Case, seed: int) -> Outcome:
    """Fails."""
    raise RuntimeError("it broke")


def never_end(case: Case, seed: int) -> Outcome:
    """Takes forever without asking anything."""
    while True:
        pass


def ask_forever(case: Case, seed: int) -> Outcome:
    """Spends any budget."""
    while True:
        case.chat(["say apple boat"] * 8)
