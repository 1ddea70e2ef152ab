"""C++ kernels, built on first use with the machine's own compiler and called through ctypes.

A library is kept in GLASSHOUSE_CACHE (default: ~/.cache/glasshouse) under a name that hashes source, flags and processor. Where no compiler is
found, or the build fails, `load_library` raises `NoCompiler` with the reason, and the caller goes on in PyTorch.
Not here: the kernels themselves (`decode.cpp`, `dictionaries/kernels.cpp`) and what they are told.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-shared", "-fPIC")


class NoCompiler(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def cache_folder() -> Path:
    """Where built kernels are kept."""
    given = os.environ.get("GLASSHOUSE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glasshouse"


def processor() -> str:
    """What tells one processor's instruction set from another's: a library built for this one may not run on that one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


def load_library(source: Path) -> ctypes.CDLL:
    """The library of one source file, built where it is not yet kept. Raises `NoCompiler`."""
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None:
        raise NoCompiler("no C++ compiler was found (g++, clang++; or name one in CXX)")
    key = hashlib.sha256("\0".join([source.read_text(encoding="utf-8"), compiler, *FLAGS, processor()]).encode()).hexdigest()[:16]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="glasshouse-"))
    path = folder / f"{source.stem}-{key}.so"
    try:
        if not path.is_file():
            _build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"{path} could not be built or loaded ({error})") from error


def _build(compiler: str, source: Path, path: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        done = subprocess.run([*compiler.split(), *FLAGS, "-o", str(part), str(source)], capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NoCompiler(f"{compiler} could not compile the kernels ({reason})")
        os.replace(part, path)
    except subprocess.TimeoutExpired as error:
        raise NoCompiler(f"{compiler} took more than five minutes over the kernels") from error
    finally:
        part.unlink(missing_ok=True)


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous CPU tensor's data is; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "kernels take contiguous tensors"
    assert tensor.device.type == "cpu", "kernels take CPU tensors"
    assert tensor.dtype in (torch.float32, torch.int32, torch.int64), "kernels take float32, int32 and int64"
    return tensor.data_ptr()
