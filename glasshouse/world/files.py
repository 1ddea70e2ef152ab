"""Grammar `files`: short transcripts of listing, reading and editing arbitrary config files in a small shell.

The transcripts are exact: the state of the files is tracked, and every output follows from it.
"""

from __future__ import annotations

import random

from glasshouse.world import names
from glasshouse.world.base import Document, World, grammar

_KEYS = ["size", "colour", "limit", "mode", "level", "port"]
_STEMS = ["garden", "shop", "boat", "clock", "mill", "lamp"]


@grammar("files", "listing, reading and editing config files in a small shell")
def write_session(world: World, rng: random.Random) -> Document:
    """One to three commands over two files, with the outputs that follow."""
    files: dict[str, str] = {}
    for stem in rng.sample(_STEMS, 2):
        key = rng.choice(_KEYS)
        files[f"{stem}.cfg"] = f"{key}={rng.choice(names.COLOURS) if key == 'colour' else rng.randint(1, 9)}"
    lines: list[str] = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(files))
        action = rng.choice(["ls", "cat", "write", "missing"])
        if action == "ls":
            lines.append("<bash>ls<stdout>" + " ".join(sorted(files)))
        elif action == "cat":
            lines.append(f"<bash>cat {name}<stdout>{files[name]}")
        elif action == "missing":
            lines.append("<bash>cat notes.cfg<stderr>no such file: notes.cfg")
        else:
            key = files[name].split("=")[0]
            files[name] = f"{key}={rng.choice(names.COLOURS) if key == 'colour' else rng.randint(1, 9)}"
            lines.append(f"<bash>echo {files[name]} > {name}<stdout>")
    return Document("files", "shell", text="".join(lines), labels={"files": dict(files)})
