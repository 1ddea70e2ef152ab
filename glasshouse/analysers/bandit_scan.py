"""bandit inside this process: a third of a millisecond a function, so that it can score every checkpoint and be an RL reward.

It calls one private method of bandit, which is pinned (1.9); with another version it runs bandit's command line instead, and every
`Scan.analyser` says which of the two it was. `# nosec` comments are ignored: a model that is rewarded by an analyser learns to write them.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from glasshouse.analysers.findings import LEVELS, Finding, Scan, at_least
from glasshouse.errors import GlasshouseError
from glasshouse.world.code import compiles

PINNED = "1.9."
MODES = ("in process", "command line")
_NAME = os.path.join(os.devnull, "answer.py")  # a path, because bandit wants one; nothing is read from it
_LOCK = threading.Lock()


def scan(source: str, *, severity: str = "MEDIUM", confidence: str = "MEDIUM", mode: str = "") -> Scan:
    """Scan one module. Findings below either threshold are left out; a module that does not compile is not shown to bandit.

    `mode` is `in process` or `command line`; empty takes what `bandit_mode()` gives.
    Raises `UnknownName` for an unknown level, `GlasshouseError` when bandit is not installed.
    """
    return scan_batch([source], severity=severity, confidence=confidence, mode=mode)[0]


def scan_batch(sources: Sequence[str], *, severity: str = "MEDIUM", confidence: str = "MEDIUM", mode: str = "") -> list[Scan]:
    """`scan` for many modules, in order; the command line is started once for all of them."""
    way = mode or bandit_mode()
    at_least((), severity, confidence)
    whole = [compiles(source) for source in sources]
    shown = [source for source, good in zip(sources, whole) if good]
    found = iter(_scan_here(shown) if way == MODES[0] else _scan_by_command(shown))
    analyser = f"bandit {bandit_version()}, {way}"
    scans = []
    for good in whole:
        findings, error = next(found) if good else ((), "")
        scans.append(Scan(at_least(findings, severity, confidence), good, analyser, error))
    return scans


@cache
def bandit_version() -> str:
    """The installed version. Raises `GlasshouseError` when there is none."""
    try:
        return importlib.metadata.version("bandit")
    except importlib.metadata.PackageNotFoundError as error:
        raise GlasshouseError("Scanning code needs bandit, which is not installed; type: pip install 'glasshouse[code]'") from error


@cache
def bandit_mode() -> str:
    """`in process` with the pinned version and its private method, else `command line`."""
    if not bandit_version().startswith(PINNED):
        return MODES[1]
    from bandit.core import manager

    return MODES[0] if hasattr(manager.BanditManager, "_parse_file") else MODES[1]


_Raw = tuple[tuple[Finding, ...], str]


def _scan_here(sources: Sequence[str]) -> list[_Raw]:
    with _LOCK:
        return [_scan_one(source) for source in sources]


@cache
def _manager() -> Any:
    from bandit.core import config, manager

    log = logging.getLogger("bandit")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    return manager.BanditManager(config.BanditConfig(), "file", ignore_nosec=True)


@lru_cache(maxsize=4096)
def _scan_one(source: str) -> _Raw:
    manager = _manager()
    manager.results, manager.skipped, manager.scores = [], [], []
    manager.metrics.data.clear()
    manager._parse_file(_NAME, BytesIO(source.encode()), [_NAME])
    if manager.skipped:
        return (), f"bandit: {manager.skipped[0][1]}"
    return tuple(
        Finding(issue.test_id, int(issue.cwe.id or 0), _level(issue.severity), _level(issue.confidence), int(issue.lineno or 0), str(issue.text))
        for issue in manager.results
    ), ""


def _level(said: str) -> str:
    return said if said in LEVELS else LEVELS[0]  # bandit has a fourth, UNDEFINED


def _scan_by_command(sources: Sequence[str]) -> list[_Raw]:
    if not sources:
        return []
    with tempfile.TemporaryDirectory(prefix="bandit-") as folder:
        paths = [Path(folder) / f"answer_{index:06d}.py" for index in range(len(sources))]
        for path, source in zip(paths, sources):
            path.write_text(source, encoding="utf-8", newline="")
        command = [sys.executable, "-m", "bandit", "--recursive", "--format", "json", "--ignore-nosec", "--quiet", "--exit-zero", folder]
        ended = subprocess.run(command, capture_output=True, text=True)
        try:
            told = json.loads(ended.stdout)
        except ValueError as error:
            raise GlasshouseError(f"bandit's command line gave no report (exit code {ended.returncode}): {ended.stderr.strip()[-300:]}") from error
    return [_of_file(told, path.name) for path in paths]


def _of_file(told: dict[str, Any], name: str) -> _Raw:
    failed = [item["reason"] for item in told.get("errors", ()) if Path(item["filename"]).name == name]
    own = [item for item in told["results"] if Path(item["filename"]).name == name]
    return tuple(map(_from_json, own)), f"bandit: {failed[0]}" if failed else ""


def _from_json(item: dict[str, Any]) -> Finding:
    cwe, severity, confidence = int(item.get("issue_cwe", {}).get("id", 0)), _level(item["issue_severity"]), _level(item["issue_confidence"])
    return Finding(item["test_id"], cwe, severity, confidence, int(item["line_number"]), item["issue_text"])
