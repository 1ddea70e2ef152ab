"""The house rules, checked on the source: floors, sizes, names, docstrings, the public names, and nothing of this machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import glasshouse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "glasshouse"

FLOORS = {
    "ground": ("errors", "registry", "records", "stats", "power", "plots", "progress"),
    "first": (
        "processes",
        "models",
        "loading",
        "sites",
        "positions",
        "checks",
        "edits",
        "conditions",
        "edit_files",
        "folding",
        "compiling",
        "decoding",
        "functional",
        "grids",
        "activations",
        "text",
        "sampling",
        "vectors",
        "probes",
        "dictionaries",
        "features",
        "maze",
    ),
    "second": ("world", "environments", "training", "sandbox", "analysers"),
    "third": ("specimens", "backdoors", "curves", "organisms", "evals", "retraining", "sweeping"),
    "fourth": ("audit",),
    "roof": ("report", "cli", "inspect", "serving", "web", "__main__"),
}
HEIGHT = {module: height for height, modules in enumerate(FLOORS.values()) for module in modules}
HEAVY = {"torch", "transformers", "tokenizers", "accelerate", "peft", "trl", "datasets", "safetensors"}
SLOW_AT_HELP = {*HEAVY, "scipy", "sklearn", "altair", "rich", "jinja2", "numpy"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_OPENING_LINES = 500, 60, 8
LONG_OPENINGS = {"glasshouse/errors.py", "glasshouse/__init__.py"}
"""The error tree is drawn in the first; the second is the page that `help(glasshouse)` shows."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "shared"}
KNOWN_HOSTS = {"github.com", "huggingface.co", "arxiv.org", "doi.org", "www.apache.org", "www.w3.org"} | {"127.0.0.1", "localhost"}
MACHINE_PATHS = re.compile("|".join("/" + name + "/" for name in ("work", "opt", "root", "home", "mnt", "Users")))


@cache
def sources() -> dict[str, ast.Module]:
    """Path from the root -> parsed module, for the package."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def checked_scripts() -> dict[str, ast.Module]:
    """The same for what stands beside the package."""
    folders = ("papers", "bench", "scripts", "tests")
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def module_of(path: str) -> str:
    """`glasshouse/world/base.py` -> `world`; the package's own `__init__` -> ``."""
    parts = Path(path).with_suffix("").parts[1:]
    return "" if parts == ("__init__",) else parts[0]


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Every dotted name that a tree imports, late imports included; `package` is the dotted package that relative imports start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


def floors_touched(path: str, tree: ast.AST) -> set[str]:
    """The top-level modules of this package that a file imports; a name taken from the package itself counts as where it lives."""
    parent = ".".join(Path(path).parent.parts)
    touched = set()
    for name in imported(tree, parent):
        parts = name.split(".")
        if parts[0] == "glasshouse" and len(parts) > 1:
            home = glasshouse._HOMES.get(parts[1], parts[1])
            if home not in ("__version__", "__all__"):
                touched.add(home)
    return touched


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: not inside functions, not under TYPE_CHECKING."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, also nested ones and methods."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def is_frozen_dataclass(node: ast.ClassDef) -> bool:
    """Whether a class is decorated as a frozen dataclass."""
    decorators = [ast.unparse(decorator).replace(" ", "") for decorator in node.decorator_list]
    return any("dataclass(" in text and "frozen=True" in text for text in decorators)


def is_public(name: str) -> bool:
    """No leading underscore."""
    return not name.startswith("_")


def tell(offenders: list[str]) -> None:
    """Fail with one offender a line."""
    assert not offenders, "\n" + "\n".join(offenders)


def test_every_module_has_a_floor() -> None:
    tell([f"{path}: place {module_of(path)!r} in FLOORS" for path in sources() if module_of(path) not in {"", *HEIGHT}])


def test_imports_never_go_up() -> None:
    offenders = []
    for path, tree in sources().items():
        own = module_of(path)
        if own:
            above = [name for name in floors_touched(path, tree) if name in HEIGHT and HEIGHT[name] > HEIGHT[own]]
            offenders += [f"{path} ({own}) imports {name}, which is on a higher floor" for name in above]
    tell(offenders)


def test_imports_name_modules_that_exist() -> None:
    known = {module_of(path) for path in sources()}
    tell([f"{path}: glasshouse.{name}" for path, tree in sources().items() for name in floors_touched(path, tree) if name not in known])


def test_the_floor_check_sees_an_upward_import() -> None:
    tree = ast.parse("def f():\n    from glasshouse.cli import app\n    from . import audit\n    from glasshouse import grow")
    assert floors_touched("glasshouse/models.py", tree) == {"cli", "audit", "organisms"}


def test_the_ground_floor_knows_no_models() -> None:
    offenders = []
    for path, tree in sources().items():
        if module_of(path) in FLOORS["ground"]:
            offenders += [f"{path} imports {name}" for name in imported(tree) if name.split(".")[0] in HEAVY]
    tell(offenders)


def test_the_command_line_imports_nothing_heavy_at_import() -> None:
    offenders = []
    for path, tree in sources().items():
        if module_of(path) in ("", "cli", "__main__", "errors", "registry"):
            offenders += [f"{path} imports {n}" for node in at_import(tree) for n in imported_by(node) if n.split(".")[0] in SLOW_AT_HELP]
    tell(offenders)


def imported_by(node: ast.stmt) -> list[str]:
    """What one statement (not its children) imports."""
    return list(imported(node)) if isinstance(node, (ast.Import, ast.ImportFrom)) else []


def test_files_stay_short() -> None:
    counted = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in [*sources(), *checked_scripts()]}
    tell([f"{path}: {count} lines" for path, count in counted.items() if count > MOST_LINES])


def test_papers_stay_within_one_page() -> None:
    counted = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "papers").glob("*.py")}
    tell([f"{path}: {count} lines" for path, count in counted.items() if count > 150])


def test_functions_stay_short() -> None:
    offenders = []
    for path, tree in [*sources().items(), *checked_scripts().items()]:
        for node in functions(tree):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                offenders.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    tell(offenders)


def test_no_vague_module_names() -> None:
    tell([path for path in [*sources(), *checked_scripts()] if VAGUE & set(Path(path).with_suffix("").parts)])


def test_every_file_opens_by_saying_what_it_is() -> None:
    offenders = []
    for path, tree in [*sources().items(), *checked_scripts().items()]:
        text = ast.get_docstring(tree)
        if not text:
            offenders.append(f"{path}: no docstring")
        elif len(text.splitlines()) > MOST_OPENING_LINES and path not in LONG_OPENINGS:
            offenders.append(f"{path}: opens with {len(text.splitlines())} lines")
    tell(offenders)


def test_public_names_have_docstrings() -> None:
    offenders = []
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and is_public(node.name):
                offenders += undocumented(path, node)
    tell(offenders)


def undocumented(path: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[str]:
    """A public function or class without docstring, and its public methods without one."""
    found = [] if ast.get_docstring(node) else [f"{path}:{node.lineno} {node.name}"]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_public(method.name):
                borrowed = any("overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in method.decorator_list)
                if not borrowed and not ast.get_docstring(method):
                    found.append(f"{path}:{method.lineno} {node.name}.{method.name}")
    return found


def test_every_frozen_dataclass_field_has_a_docstring_under_it() -> None:
    offenders = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and is_frozen_dataclass(node):
                offenders += [f"{path}:{line} {node.name}.{field}" for field, line in bare_fields(node)]
    tell(offenders)


def bare_fields(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Fields of a dataclass that are not followed by a string."""
    for line, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and "ClassVar" not in ast.unparse(line.annotation):
            told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str)
            if not told:
                yield line.target.id, line.lineno


def test_everything_is_annotated() -> None:
    offenders = []
    for path, tree in sources().items():
        for node in functions(tree):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or node.returns is None:
                offenders.append(f"{path}:{node.lineno} {node.name}({', '.join(bare)})")
    tell(offenders)


def test_public_names_resolve() -> None:
    assert sorted(glasshouse.__all__) == sorted(glasshouse._HOMES)
    for name in glasshouse.__all__:
        assert getattr(glasshouse, name) is not None


def test_public_names_are_the_documented_names() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## `glasshouse\.(\w+)`$", page, re.MULTILINE)) == sorted(glasshouse.__all__)


def test_importing_the_package_imports_no_torch() -> None:
    ground = ", ".join(f"glasshouse.{name}" for name in ("errors", "registry", "records", "progress"))
    code = f"import sys, glasshouse, {ground}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def tracked_files() -> list[Path]:
    """What git would carry; outside a checkout, the files of the package, docs and tests."""
    asked = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode == 0:
        return [ROOT / name for name in asked.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for folder in ("glasshouse", "docs", "tests") for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_nothing_of_this_machine_is_written_down() -> None:
    offenders = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = str(path.relative_to(ROOT))
        offenders += [f"{name}: {match.group(0)}" for match in MACHINE_PATHS.finditer(text)]
        offenders += [f"{name}: {host}" for host in re.findall(r"https?://([\w.-]+)", text) if host not in KNOWN_HOSTS]
    tell(sorted(set(offenders)))


def test_the_wheel_carries_every_file_of_the_package() -> None:
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["glasshouse"]
    carried = {path for pattern in globs for path in PACKAGE.glob(pattern)}
    data = {path for path in tracked_files() if PACKAGE in path.parents and path.suffix != ".py"}
    tell(sorted(str(path.relative_to(ROOT)) for path in data - carried))


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in ("web", "inspect", "trl", "dev") for line in extras[name])]
    pinned = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    names = {re.split(r"[\[<>=!~ ]", line)[0] for line in wanted} - {"glasshouse"}
    assert names <= set(pinned)


NOT_THE_NAME = {
    "scikit-learn": "sklearn",
    "vl-convert-python": "vl_convert",
    "pyyaml": "yaml",
    "inspect-ai": "inspect_ai",
    "sentence-transformers": "sentence_transformers",
}
"""Distributions whose import name is another."""


def test_what_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for name in ("gym", "web", "inspect", "embed", "trl", "code", "ray") for line in project["optional-dependencies"][name]),
    ]
    names = {re.split(r"[\[<>=!~ ]", line)[0] for line in lines}
    known = {NOT_THE_NAME.get(name, name).replace("-", "_") for name in names} | {"glasshouse", *sys.stdlib_module_names}
    known |= {"triton"}  # comes with torch's CUDA build, in the version that fits it; nothing else needs it
    offenders = []
    for path, tree in sources().items():
        roots = {name.split(".")[0] for name in imported(tree, ".".join(Path(path).parent.parts))}
        offenders += [f"{path}: {root} is in no extra of pyproject.toml" for root in sorted(roots - known)]
    tell(offenders)
