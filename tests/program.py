"""The real program without its start: one process imports torch and transformers once, and forks a child for each command.

A child is the program from its first line on (`python -m glasshouse`, or a script): its own arguments, environment, folder, streams and exit code.
What must be started for real (import times, signals, other interpreters) is started by those tests themselves.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

WARM = "torch", "transformers", "tokenizers", "safetensors.torch", "numpy", "scipy.stats", "sklearn.linear_model", "typer", "rich.console", "altair"


class Program:
    """Runs commands in forked children. `run` is `subprocess.run` for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        line = [sys.executable, "-c", "import program; program.serve()"]
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})

    def run(self, words: list[str], cwd: Path, env: dict[str, str], stdin: str = "", timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """`words` is what stands behind `python`: `-m glasshouse list`, or a script and its arguments."""
        streams = {name: self.folder / name for name in ("stdin", "stdout", "stderr")}
        streams["stdin"].write_text(stdin, encoding="utf-8")
        request = {"words": words, "cwd": str(cwd), "env": env, "timeout": timeout} | {name: str(path) for name, path in streams.items()}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        told, errors = (streams[name].read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        if code == -14:
            raise subprocess.TimeoutExpired(words, timeout, told, errors)
        return subprocess.CompletedProcess(words, code, told, errors)

    def close(self) -> None:
        """End the process."""
        if self.server.stdin is not None:
            self.server.stdin.close()
        self.server.wait(timeout=30)


def serve() -> None:
    """The process that forks: reads one request a line, answers with the exit code (negative: the signal that ended the child)."""
    import importlib

    sys.path.remove(str(Path(__file__).parent))
    for name in WARM:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(request: dict[str, Any]) -> None:
    """The child: be the program, then end."""
    import signal

    signal.alarm(int(request["timeout"]))
    fresh = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, flags) in enumerate({"stdin": os.O_RDONLY, "stdout": fresh, "stderr": fresh}.items()):
        os.dup2(os.open(request[name], flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  it lasts as long as the process
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code: Any = 1
    try:
        run(request["words"])
        code = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(words: list[str]) -> None:
    """What `python` does with these words."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
