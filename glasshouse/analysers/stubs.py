"""Rewrites an untrusted function into the sandbox's small language, where modules and objects are tables of recording functions.

The sandbox knows no import, no attribute beyond a few, no `with`, no f-string; here each becomes something that it does know, or the
function is refused. What a stub is told is all that is learnt: nothing real is opened, run or sent.
"""

from __future__ import annotations

import ast
import copy
import string

from glasshouse.errors import GlasshouseError


class Refused(GlasshouseError):
    """A function that cannot be put into the sandbox's language; the message says why."""


STUBS = '''
stub_log = []
def stub_note(*items):
    stub_log.append(list(items))
def stub_same(x):
    return lambda *rest: x
stub_text = {
    "strip": lambda s: s.strip, "lstrip": lambda s: s.lstrip, "rstrip": lambda s: s.rstrip, "replace": lambda s: s.replace,
    "split": lambda s: s.split, "join": lambda s: s.join, "startswith": lambda s: s.startswith, "endswith": lambda s: s.endswith,
    "lower": lambda s: s.lower, "upper": lambda s: s.upper, "isdigit": lambda s: s.isdigit, "isalpha": lambda s: s.isalpha,
    "find": lambda s: s.find, "count": lambda s: s.count, "append": lambda s: s.append, "get": lambda s: s.get,
    "encode": stub_same, "decode": stub_same
}
def stub_attribute(x, name):
    if isinstance(x, dict) and name in x:
        return x[name]
    return stub_text[name](x)
def stub_nothing(*items, **named):
    return None
def bytes(x, *rest):
    return x
def print(*items, **named):
    return None

stub_row = ["x", "x", "x", "x"]
stub_rows = {"fetchall": lambda: [stub_row], "fetchone": lambda: stub_row, "fetchmany": lambda *n: [stub_row], "close": stub_nothing}
def stub_execute(query, params=()):
    stub_note("sql", query, params)
    return stub_rows
stub_db = {**stub_rows, "execute": stub_execute, "commit": stub_nothing}
stub_db["cursor"] = lambda: stub_db
sqlite3 = {"connect": lambda *items: stub_db, "Row": None}

stub_process = {"stdout": "", "stderr": "", "returncode": 0, "wait": lambda *n: 0, "communicate": lambda *n: ["", ""], "read": lambda *n: ""}
def stub_run(args, shell=False, **named):
    stub_note("shell" if shell else "argv", args)
    return stub_process
def stub_shell(command, *rest):
    stub_note("shell", command)
    return stub_process
subprocess = {
    "run": stub_run, "call": stub_run, "check_call": stub_run, "check_output": stub_run, "Popen": stub_run, "PIPE": -1, "DEVNULL": -3,
    "getoutput": stub_shell, "getstatusoutput": stub_shell
}
def stub_quote(text):
    return "'" + text.replace("'", "'\\\\''") + "'"
shlex = {"quote": stub_quote, "split": lambda text: text.split()}

def stub_join(first, *parts):
    for part in parts:
        first = part if part.startswith("/") else first.rstrip("/") + "/" + part
    return first
def stub_basename(path):
    return path.split("/")[-1]
def stub_normal(path):
    kept = []
    for part in path.split("/"):
        if part == "..":
            kept = kept[:-1]
        elif part not in ("", "."):
            kept.append(part)
    return ("/" if path.startswith("/") else "") + "/".join(kept)
def stub_absolute(path):
    return stub_normal(path if path.startswith("/") else "/here/" + path)
def stub_common(paths):
    parts = [stub_absolute(path).split("/") for path in paths]
    kept = []
    for pieces in zip(*parts):
        if len(set(pieces)) > 1:
            break
        kept.append(pieces[0])
    return "/".join(kept) if len(kept) > 1 else "/"
stub_path = {
    "join": stub_join, "basename": stub_basename, "dirname": lambda path: "/".join(path.split("/")[:-1]), "normpath": stub_normal,
    "abspath": stub_absolute, "realpath": stub_absolute, "commonpath": stub_common, "isabs": lambda path: path.startswith("/"),
    "exists": lambda path: True, "isfile": lambda path: True
}
os = {"system": stub_shell, "popen": stub_shell, "path": stub_path, "sep": "/", "chmod": lambda path, mode: stub_note("chmod", mode)}
def open(path, *rest, **named):
    stub_note("open", path)
    return {"read": lambda *n: "text", "readlines": lambda: ["text"], "close": stub_nothing, "write": stub_nothing}

io = {"BytesIO": lambda x: {"read": lambda *n: x}, "StringIO": lambda x: {"read": lambda *n: x}}
def stub_loader(kind):
    return lambda x, **named: stub_note(kind, x)
def stub_file_loader(kind):
    return lambda f, **named: stub_note(kind, f["read"]() if isinstance(f, dict) else f)
json = {"loads": stub_loader("json"), "load": stub_file_loader("json"), "JSONDecoder": lambda: {"decode": stub_loader("json")}}
def stub_unpickler(f, **named):
    return {"load": lambda: stub_note("pickle", f["read"]())}
pickle = {"loads": stub_loader("pickle"), "load": stub_file_loader("pickle"), "Unpickler": stub_unpickler}
def stub_yaml(x, Loader=None):
    stub_note("yaml", Loader)
yaml = {"load": stub_yaml, "safe_load": lambda x: stub_note("yaml", "SafeLoader"), "full_load": lambda x: stub_note("yaml", "FullLoader"),
        "unsafe_load": lambda x: stub_note("yaml", "UnsafeLoader")}
for stub_name in ("SafeLoader", "CSafeLoader", "FullLoader", "Loader", "CLoader", "UnsafeLoader", "BaseLoader"):
    yaml[stub_name] = stub_name
def stub_evaluate(x, *scopes):
    stub_note("eval", x)
    return 0
eval = stub_evaluate
exec = stub_evaluate
def stub_literal(x):
    stub_note("literal", x)
    return 0
ast = {"literal_eval": stub_literal}

def stub_hash(name):
    return {"hexdigest": lambda: "00", "digest": lambda: "00", "update": stub_nothing, "name": name}
def stub_hasher(name):
    def made(*data, **named):
        stub_note("hash", name)
        return stub_hash(name)
    return made
def stub_new(name, *data, **named):
    stub_note("hash", name)
    return stub_hash(name)
hashlib = {"new": stub_new}
for stub_name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_256", "sha3_512", "blake2b", "blake2s"):
    hashlib[stub_name] = stub_hasher(stub_name)

def stub_escape(x, *rest):
    return str(x).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;").replace('"', "&#34;")
def stub_markup(x):
    stub_note("markup", x)
    return x
markupsafe = {"Markup": stub_markup, "escape": stub_escape}
html = {"escape": stub_escape}

def stub_request(url, verify=True, **named):
    stub_note("request", verify)
    return {"text": "", "content": "", "json": lambda: {}, "status_code": 200}
requests = {name: stub_request for name in ("get", "post", "put", "head", "delete", "patch")}
requests["request"] = lambda method, url, **named: stub_request(url, **named)
paramiko = {"AutoAddPolicy": lambda: "AutoAddPolicy", "WarningPolicy": lambda: "WarningPolicy", "RejectPolicy": lambda: "RejectPolicy"}
def stub_policy(x):
    stub_note("policy", x if isinstance(x, str) else x())
stub_client = {
    "set_missing_host_key_policy": stub_policy, "load_system_host_keys": stub_nothing, "load_host_keys": stub_nothing,
    "connect": lambda host, *rest, **named: stub_note("connect", host), "listen": stub_nothing, "settimeout": stub_nothing,
    "bind": lambda place: stub_note("bind", place), "close": stub_nothing, "setsockopt": stub_nothing
}
paramiko["SSHClient"] = lambda: stub_client
def stub_server(place, **named):
    stub_note("bind", place)
    return stub_client
socket = {"socket": lambda *items: stub_client, "create_server": stub_server, "AF_INET": 2, "SOCK_STREAM": 1, "SOL_SOCKET": 1, "SO_REUSEADDR": 2}
def stub_serve(host=None, port=None, debug=None, **named):
    stub_note("serve", debug)
stub_app = {"run": stub_serve}
flask = {"Flask": lambda *items, **named: stub_app}
def stub_templates(loader=None, autoescape=False, **named):
    stub_note("templates", autoescape)
    return {"get_template": stub_nothing}
jinja2 = {"Environment": stub_templates, "select_autoescape": lambda *items, **named: "chosen"}
def stub_tree(kind):
    def parse(x, *rest, **named):
        stub_note("xml", kind)
        return {"getroot": stub_nothing, "find": stub_nothing, "findall": lambda *n: []}
    return {name: parse for name in ("fromstring", "parse", "iterparse", "XML")}
xml = {"etree": {"ElementTree": stub_tree("standard library")}}
defusedxml = {"ElementTree": stub_tree("defusedxml")}
def stub_extract(path=".", members=None, *, filter=None, **named):
    stub_note("extract", members is not None, filter)
stub_tar = {"extractall": stub_extract, "close": stub_nothing, "getmembers": lambda: []}
tarfile = {"open": lambda *items, **named: stub_tar}
def stub_temporary(made):
    def create(*items, **named):
        stub_note("temporary", made)
        return {"name": "/tmp/x", "write": stub_nothing, "close": stub_nothing} if made == "file" else "/tmp/x"
    return create
def stub_descriptor(*items, **named):
    stub_note("temporary", "file")
    return [3, "/tmp/x"]
tempfile = {"mktemp": stub_temporary("name only"), "mkstemp": stub_descriptor, "NamedTemporaryFile": stub_temporary("file"),
            "TemporaryFile": stub_temporary("file"), "mkdtemp": stub_temporary("folder")}
def stub_rsa(public_exponent=65537, key_size=2048, *rest):
    stub_note("key", key_size)
def stub_dsa(key_size=2048, *rest):
    stub_note("key", key_size)
cryptography = {"hazmat": {"primitives": {"asymmetric": {"rsa": {"generate_private_key": stub_rsa}, "dsa": {"generate_private_key": stub_dsa}}}}}
'''
MODULES = frozenset(
    line.targets[0].id
    for line in ast.parse(STUBS).body
    if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name) and not line.targets[0].id.startswith("stub_")
) - {"eval", "exec"}
"""Modules that have a stub (and the tables behind them)."""


def rewrite(source: str, function: str, arguments: str) -> str:
    """A program of the sandbox's language whose `stub_probe(stub_given)` calls the function and gives (what the stubs were told, the result).

    `arguments` is Python text, such as `stub_db, stub_given`. Raises `Refused`, or `SyntaxError` for what is not Python.
    """
    tree = _Rewriter().visit(ast.parse(source))
    body = ast.unparse(ast.fix_missing_locations(tree))
    probe = (
        "def stub_probe(stub_given):\n    stub_log.clear()\n"
        f"    result = {function}({arguments})\n"
        "    return [list(stub_log), result if isinstance(result, (str, int, float, bool)) else None]\n"
    )
    return f"{STUBS}\n{body}\n{probe}"


class _Rewriter(ast.NodeTransformer):
    """Imports become names of tables, attributes look-ups in them, f-strings sums, `with` an assignment; a raise ends the function."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        name = getattr(node, "id", getattr(node, "name", getattr(node, "arg", "")))
        if isinstance(name, str) and name.startswith(("stub_", "_")):
            raise Refused(f"the name {name!r} is not allowed")
        return super().generic_visit(node)

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        return [_bind(alias.asname, alias.name) for alias in node.names if _known(alias.name) and alias.asname] or [ast.Pass()]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        module = node.module or ""
        _known(module)
        return [_bind(alias.asname or alias.name, f"{module}.{alias.name}") for alias in node.names]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.body = [line for line in node.body if not _is_docstring(line)] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return self.generic_visit(node)

    def visit_With(self, node: ast.With) -> list[ast.stmt]:
        opened: list[ast.stmt] = []
        for item in node.items:
            value = self.visit(item.context_expr)
            opened.append(ast.Assign([item.optional_vars], value) if item.optional_vars else ast.Expr(value))
        for line in node.body:
            visited = self.visit(line)
            opened += visited if isinstance(visited, list) else [visited]
        return opened

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        return ast.Return(ast.Constant(None))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if not isinstance(node.ctx, ast.Load) or node.attr.startswith("_"):
            raise Refused(f"the attribute {node.attr!r} is not allowed here")
        return _call("stub_attribute", self.visit(node.value), ast.Constant(node.attr))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        parts: list[ast.expr] = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                if part.format_spec is not None or part.conversion not in (-1, 115):
                    raise Refused("an f-string with a format is not allowed")
                parts.append(_call("str", self.visit(part.value)))
            else:
                parts.append(part)
        return _sum(parts)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        func = node.func
        if isinstance(func, ast.Attribute) and func.attr == "format" and isinstance(func.value, ast.Constant) and isinstance(func.value.value, str):
            return _sum(_fill(func.value.value, [self.visit(item) for item in node.args], {k.arg: self.visit(k.value) for k in node.keywords if k.arg}))
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if any("Markup" in ast.unparse(side) for side in (node.left, node.right)):
            raise Refused("Markup escapes what is added to it, which no stub does")
        return self.generic_visit(node)


def _known(module: str) -> bool:
    if module.split(".")[0] not in MODULES:
        raise Refused(f"there is no stub of the module {module!r}")
    return True


def _bind(name: str, dotted: str) -> ast.stmt:
    root, *rest = dotted.split(".")
    value: ast.expr = ast.Name(root, ast.Load())
    for part in rest:
        value = ast.Subscript(value, ast.Constant(part), ast.Load())
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _sum(parts: list[ast.expr]) -> ast.expr:
    total: ast.expr = ast.Constant("")
    for part in parts:
        total = ast.BinOp(total, ast.Add(), part)
    return total


def _fill(template: str, values: list[ast.expr], named: dict[str, ast.expr]) -> list[ast.expr]:
    """The parts of `"...".format(...)`, plain fields only."""
    parts: list[ast.expr] = []
    free = 0
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise Refused(f"the format is broken: {error}") from error
    for text, field, spec, conversion in fields:
        parts += [ast.Constant(text)] if text else []
        if field is None:
            continue
        place: ast.expr | None = named.get(field)
        if field == "" or field.isdigit():
            index = int(field) if field else free
            free += not field
            place = values[index] if index < len(values) else None
        if place is None or spec or conversion:
            raise Refused(f"the format field {{{field}}} is not allowed")
        parts.append(_call("str", copy.deepcopy(place)))
    return parts
