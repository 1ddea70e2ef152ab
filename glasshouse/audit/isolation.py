"""Shuts the technique's process in: Landlock for files and TCP, seccomp for sockets and peeking at other processes, no capabilities.

It is no virtual machine: the technique shares the kernel, the CPU and its caches with the game master. On a kernel without Landlock
the technique still runs in a process of its own, and `shut_in` says so: its answer stands in every result.
Numbers are those of the Linux headers (landlock.h of ABI 7, seccomp.h, capability.h).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_NO_NEW_PRIVILEGES, _SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUND = 38, 4, 22, 24

# Refused system calls: socket, ptrace, process_vm_readv/writev, mount, unshare, setns, bpf, perf_event_open, io_uring_setup, pidfd_open/getfd.
_REFUSED = {
    "x86_64": (0xC000003E, (41, 101, 310, 311, 165, 272, 308, 321, 298, 425, 434, 438)),
    "aarch64": (0xC00000B7, (198, 117, 270, 271, 40, 97, 268, 280, 241, 425, 434, 438)),
}


@dataclass(frozen=True)
class Isolation:
    """The isolation that was reached."""

    landlock: int
    """The ABI of Landlock in force; 0 where the kernel has none."""
    seccomp: bool
    """Whether sockets and peeking at other processes are refused."""
    capabilities_dropped: bool
    """Whether the process holds no capability."""

    def describe(self) -> str:
        """One line for a report."""
        if not self.landlock:
            return f"separate process only: this kernel has no Landlock (seccomp {'on' if self.seccomp else 'off'})"
        parts = ["reads only Python and its libraries, writes only a scratch folder"]
        parts.append("no sockets" if self.seccomp else "no TCP" if self.landlock >= 4 else "network not restricted")
        parts.append("no capabilities" if self.capabilities_dropped else "capabilities kept")
        return f"landlock (abi {self.landlock}): {', '.join(parts)}"


def landlock_abi() -> int:
    """The Landlock ABI of this kernel, 0 where there is none (or it is switched off, or this is not Linux)."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, 0, 1)))


def shut_in(readable: Iterable[str | Path], writable: Iterable[str | Path]) -> Isolation:
    """Shut this process in for good. Files under `readable` can be read and executed, those under `writable` changed; all else is refused.

    Where the kernel has no Landlock, what it has is still applied, and the result says what was reached.
    """
    if not sys.platform.startswith("linux"):
        return Isolation(0, False, False)
    libc = _libc()
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    abi = landlock_abi()
    if abi:
        _restrict_files(libc, abi, readable, writable)
    dropped = _drop_capabilities(libc)
    return Isolation(abi, _refuse_calls(libc), dropped)


def set_dumpable(on: bool) -> None:
    """Whether others of the same user may read this process's memory (Linux)."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_SET_DUMPABLE, int(on), 0, 0, 0)


def without(roots: Iterable[str | Path], hidden: Sequence[str | Path]) -> list[str]:
    """`roots`, with every root that holds a hidden path replaced by its children that do not (Landlock rules only ever add)."""
    concealed = [Path(os.path.realpath(path)) for path in hidden]
    kept: list[str] = []
    pending = [Path(os.path.realpath(root)) for root in roots]
    while pending:
        root = pending.pop()
        if not root.exists() or any(root == path or root.is_relative_to(path) for path in concealed):
            continue
        if any(path.is_relative_to(root) for path in concealed):
            pending.extend(sorted(root.iterdir()))
        else:
            kept.append(str(root))
    return sorted(set(kept))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _restrict_files(libc: ctypes.CDLL, abi: int, readable: Iterable[str | Path], writable: Iterable[str | Path]) -> None:
    handled = _FILE_RIGHTS[min(abi, 5)]
    network = 3 if abi >= 4 else 0
    scoped = 3 if abi >= 6 else 0
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("<QQQ", handled, network, scoped)[:size]
    ruleset = libc.syscall(_CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "Landlock refused the rule set")
    try:
        for rights, paths in ((_READ, readable), (handled, writable)):
            for path in paths:
                _allow(libc, ruleset, Path(path), rights & handled)
        if libc.syscall(_RESTRICT_SELF, ruleset, 0):
            raise OSError(ctypes.get_errno(), "Landlock refused to restrict the process")
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        allowed = rights if path.is_dir() else rights & _FILE_ONLY
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("<Qi", allowed, descriptor), 0):
            raise OSError(ctypes.get_errno(), f"Landlock refused a rule for {path}")
    finally:
        os.close(descriptor)


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    for capability in range(64):
        if libc.prctl(_DROP_BOUND, capability, 0, 0, 0):
            break
    header, empty = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    return bool(libc.capset(header, empty) == 0)


def _refuse_calls(libc: ctypes.CDLL) -> bool:
    """A seccomp filter that answers "permission denied" to the refused calls, and to calls of another architecture."""
    if platform.machine() not in _REFUSED:
        return False
    architecture, calls = _REFUSED[platform.machine()]
    denied = (0x06, 0, 0, 0x00050000 | 13)
    # Jumps count the lines to skip: every comparison lands on the last line (deny), the line before it allows.
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), denied, (0x20, 0, 0, 0), (0x35, len(calls) + 1, 0, 0x40000000)]
    program += [(0x15, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    program += [(0x06, 0, 0, 0x7FFF0000), denied]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(_SET_SECCOMP, 2, ctypes.create_string_buffer(filter_program, len(filter_program)), 0, 0) == 0)
