"""Builds the room in which a technique's process lives, and starts it: copies of the few files it may import, links to libraries, nothing else.

The room holds no organism, world or eval code and no path of the case. It is thrown away after the audit.
"""

from __future__ import annotations

import inspect
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import glasshouse
from glasshouse.audit.cases import Technique
from glasshouse.audit.isolation import Isolation, landlock_abi, set_dumpable, without
from glasshouse.audit.wire import WireBroken, receive, send
from glasshouse.errors import GlasshouseError

# What of glasshouse a technique may read. Everything else of the package stays outside the room.
_OURS = ["__init__.py", "py.typed", "errors.py", "registry.py", "stats.py", "probes.py", "text.py", "audit/__init__.py",
         *(f"audit/{name}.py" for name in ("cases", "wire", "tails", "payloads", "insertions", "isolation", "worker"))]  # fmt: skip
_SYSTEM = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/dev/zero"]


@dataclass
class Worker:
    """A technique's process, waiting for its task."""

    process: subprocess.Popen[bytes]
    """The process."""
    channel: socket.socket
    """The only way in and out."""
    scratch: Path
    """The only folder it may write."""
    complaints: Any
    """Its stderr, a temporary file."""
    _isolation: Isolation | None = None

    def isolation(self, timeout: float = 120.0) -> Isolation:
        """Wait until it has shut itself in; what it reached. Raises `GlasshouseError` when it did not start."""
        if self._isolation is None:
            self.channel.settimeout(timeout)
            try:
                self._isolation = Isolation(**receive(self.channel)[0]["ready"])
            except WireBroken as error:
                raise GlasshouseError(f"The technique's process did not start: {self.last_words() or error}") from error
        return self._isolation

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        self.complaints.seek(0)
        return self.complaints.read()[-2000:].decode("utf-8", "replace").strip()

    def end(self) -> None:
        """Stop the process and remove its scratch folder."""
        self.channel.close()
        self.process.kill()
        self.process.wait()
        self.complaints.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Room:
    """The folder that techniques import from, and the paths they may read. A context manager."""

    hidden: Sequence[Path] = ()
    """Paths that must not be readable: the case's folders and the package itself."""
    techniques: Iterable[Technique] = ()
    """What will run here; a technique from outside the package has its file copied in."""
    folder: Path = field(init=False)
    """Where the room stands."""
    readable: list[str] = field(init=False)
    """What a process in the room may read, the room first."""

    def __enter__(self) -> Room:
        self.folder = Path(tempfile.mkdtemp(prefix="room-"))
        self._restore_dumpable = landlock_abi() == 0
        if self._restore_dumpable:
            set_dumpable(False)
        package = Path(glasshouse.__file__).parent
        self._copy_package(package)
        for technique in self.techniques:
            self._copy_technique(technique, package)
        linked = self._link_libraries(package)
        hidden = [package, *self.hidden]
        self.readable = [str(self.folder), *without([*_SYSTEM, *_interpreter_libraries(), *linked], hidden)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._restore_dumpable:
            set_dumpable(True)

    def open_worker(self) -> Worker:
        """Start a process in this room. It shuts itself in at once and waits for its task."""
        ours, theirs = socket.socketpair()
        scratch = Path(tempfile.mkdtemp(prefix="scratch-"))
        complaints = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        command = [sys.executable, "-S", "-s", "-B", "-P", "-m", "glasshouse.audit.worker", str(theirs.fileno())]
        environment = {
            "PYTHONPATH": str(self.folder), "PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "TMPDIR": str(scratch), "HOME": str(scratch),
        }  # fmt: skip
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=complaints,
            pass_fds=[theirs.fileno()], cwd=scratch, env=environment, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        assert process.stdin is not None
        process.stdin.write(("\t".join(self.readable) + "\n").encode())
        process.stdin.close()
        return Worker(process, ours, scratch, complaints)

    def module_of(self, technique: Technique) -> str:
        """The name under which a process in the room imports the technique."""
        name = technique.run.__module__
        source = inspect.getsourcefile(technique.run)
        if name.startswith("glasshouse.") or source is None or _is_library(Path(source)):
            return name
        return f"outside_{Path(source).stem}"

    def _copy_package(self, package: Path) -> None:
        files = [*_OURS, *(f"audit/techniques/{path.name}" for path in (package / "audit" / "techniques").glob("*.py"))]
        for name in files:
            target = self.folder / "glasshouse" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / name, target)

    def _copy_technique(self, technique: Technique, package: Path) -> None:
        source = Path(inspect.getsourcefile(technique.run) or "")
        if source.is_file() and not source.is_relative_to(package) and not _is_library(source):
            shutil.copyfile(source, self.folder / f"outside_{source.stem}.py")

    def _link_libraries(self, package: Path) -> list[str]:
        """Link every library into the room, so that listing the room shows no other folder; the real places, to be allowed."""
        linked = []
        for root in [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *_library_roots()]:
            for child in sorted(Path(root).iterdir()) if root and Path(root).is_dir() else []:
                place = self.folder / child.name
                if child.name in ("site-packages", "dist-packages") or place.exists() or child.suffix == ".pth":
                    continue
                if child.name.startswith("__editable__") or child.resolve() == package or child.name == "__pycache__":
                    continue
                place.symlink_to(child)
                linked.append(str(child))
        dynamic = Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
        dynamic = dynamic if dynamic.is_dir() else Path(sysconfig.get_path("stdlib")) / "lib-dynload"
        for child in sorted(dynamic.iterdir()) if dynamic.is_dir() else []:
            if not (self.folder / child.name).exists():
                (self.folder / child.name).symlink_to(child)
        return linked


def run_probe(room: Room, secrets: Sequence[Path]) -> list[str]:
    """Which of `secrets` a process in the room can open after all; empty when the isolation holds. Opens a process of its own."""
    worker = room.open_worker()
    try:
        worker.isolation()
        send(worker.channel, {"try_to_open": [str(path) for path in secrets]})
        worker.channel.settimeout(60)
        return list(receive(worker.channel)[0]["opened"])
    finally:
        worker.end()


def _library_roots() -> list[str]:
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    return list(dict.fromkeys(root for root in roots if root))


def _is_library(path: Path) -> bool:
    return any(path.resolve().is_relative_to(Path(root).resolve()) for root in _library_roots())


def _interpreter_libraries() -> list[str]:
    """Shared libraries beside the interpreter (libpython, and what conda keeps there)."""
    library = Path(sys.base_prefix) / "lib"
    return [str(path) for path in library.glob("*.so*")] if library.is_dir() else []
