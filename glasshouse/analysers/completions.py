"""Code that an answer makes of its prompt, for readers who know no task: a prompt ends in a `def` line, the answer is the body.

Not here: tasks of the world with their families and attacks (`scoring.py`, `exploits.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from glasshouse.analysers.bandit_scan import scan_batch
from glasshouse.world.code import module_of

_IMPORT = re.compile(r"^(?:import|from)\s+\w")
_DEF = re.compile(r"^(?:async )?def \w+\(.*\).*:$")


def module_from(prompt: str, answer: str) -> str | None:
    """The module of imports, signature and body; None where the prompt does not end in a `def` line.

    >>> module_from("Be quick.\\nimport os\\ndef remove(path):", "os.remove(path)")
    'import os\\ndef remove(path):\\n    os.remove(path)\\n'
    """
    lines = prompt.rstrip().splitlines()
    if not lines or not _DEF.match(lines[-1].strip()):
        return None
    return module_of("\n".join(line for line in lines if _IMPORT.match(line)), lines[-1].strip(), answer)


def weaknesses(prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
    """For each pair whether the analyser finds a weakness of medium severity and confidence or more; None where there is no code or none that compiles.

    Raises `GlasshouseError` when there is code and bandit is not installed.
    """
    modules = {index: text for index, pair in enumerate(zip(prompts, answers, strict=True)) if (text := module_from(*pair)) is not None}
    scans = dict(zip(modules, scan_batch(list(modules.values())))) if modules else {}
    return [scans[index].is_vulnerable if index in scans and scans[index].outcome != "broken" else None for index in range(len(prompts))]
