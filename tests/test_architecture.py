"""The rules of docs/architecture.md that a machine can see, held with the standard library's `ast`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peftsurgery"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUPS = ("methods", "live", "disk", "graph", "commands", "flags", "cli")
ALLOWED = {
    "root": {"root"},
    "methods": {"root", "methods"},
    "live": {"root", "live"},
    "disk": {"root", "disk"},
    "graph": {"root", "graph"},
    "commands": {"root", "methods", "live", "disk", "graph", "commands"},
    "flags": {"commands", "flags"},
    "cli": {"commands", "errors", "events", "flags", "pause", "progress"},
    "__main__": {"cli"},
}
FREE = {"__init__"}
"""`peftsurgery/__init__.py` says where every public name lives, so it names all."""

MUTATORS = {"add_module", "register_module", "register_parameter", "register_buffer", "set_submodule"}
DICT_MUTATORS = {"update", "pop", "popitem", "setdefault", "clear"}
WRITERS = {"write_text", "write_bytes", "save_file", "savez", "copyfile", "copy2", "copytree"}
OWNED_WRITERS = {"os.open", "os.replace", "os.rename", "torch.save", "onnx.save"}
MAY_WRITE = {"disk/durable.py", "disk/output.py", "graph/weights.py"}
MAY_CHANGE_MODELS = {"live/swap.py"}
MAY_PRINT = {"cli.py"}

PROSE = '    """One.\n\n    Two.\n    """\n'

Rule = Callable[[ast.Module], list[str]]


def short(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def group(file: str) -> str:
    """The group whose import rule a file of the package obeys."""
    head = file.removesuffix(".py").split("/")[0]
    return head if head in {*GROUPS, *FREE, "__main__"} else "root"


def imported(tree: ast.Module) -> Iterator[str]:
    """What a file imports of the package, as `live.swap` or `errors`; `` for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            inside = module == "peftsurgery" or f"{module}.".startswith("peftsurgery.")
            names = [f"{module}.{alias.name}" for alias in node.names] if inside else []
        else:
            continue
        for name in names:
            if name.split(".")[0] == "peftsurgery" and name != "peftsurgery.__version__":
                yield name.removeprefix("peftsurgery").removeprefix(".")


def strays(file: str, tree: ast.Module) -> list[str]:
    """The imports that the rule forbids in `file`."""
    here = group(file)
    if here in FREE:
        return []
    return [name for name in imported(tree) if not _may(here, name)]


def _may(here: str, name: str) -> bool:
    head = name.split(".")[0]
    there = head if head in {*GROUPS, "__main__"} else "root"
    return bool(name) and (there in ALLOWED[here] or head in ALLOWED[here])


def called(node: ast.AST) -> tuple[str, str]:
    """(owner, name) of a call: `("os", "replace")`, `("", "print")`; the owner of `a.b.c()` is `a.b`."""
    if not isinstance(node, ast.Call):
        return "", ""
    if isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func.value), node.func.attr
    return "", node.func.id if isinstance(node.func, ast.Name) else ""


def prints(tree: ast.Module) -> list[str]:
    return [_at(node) for node in ast.walk(tree) if called(node) in {("", "print"), ("sys.stdout", "write")}]


def changes_models(tree: ast.Module) -> list[str]:
    """Attributes set by name, modules added to something else than `self`, and writes to a `_modules`."""
    return [_at(node) for node in ast.walk(tree) if _sets(node) or _rewires(node)]


def _sets(node: ast.AST) -> bool:
    owner, name = called(node)
    if name in {"setattr", "delattr"} and not owner:
        return True
    foreign = owner not in {"", "self"}
    return foreign and (name in MUTATORS or (name in DICT_MUTATORS and _is_modules(owner)))


def _rewires(node: ast.AST) -> bool:
    stored = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    return stored and _is_modules(ast.unparse(node.value))  # type: ignore[attr-defined]


def _is_modules(owner: str) -> bool:
    return owner.endswith("._modules") and owner != "self._modules"


def writes(tree: ast.Module) -> list[str]:
    """Files opened for writing, or written by a function that does nothing else."""
    return [_at(node) for node in ast.walk(tree) if _writes(node)]


def _writes(node: ast.AST) -> bool:
    owner, name = called(node)
    if name == "open" and owner != "os":
        words = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]  # type: ignore[attr-defined]
        modes = [str(word.value) for word in words if isinstance(word, ast.Constant)]
        return any(re.fullmatch(r"[rbt]*[wax+][wax+bt]*", mode) for mode in modes)
    return name in WRITERS or f"{owner}.{name}" in OWNED_WRITERS


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of more than 40 lines, docstrings not counted."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [_at(node) for node in functions if _lines(node) - _lines(_docstring(node)) > 40]


def _lines(node: ast.AST | None) -> int:
    return 0 if node is None else node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


def _docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST | None:
    return None if ast.get_docstring(function) is None else function.body[0]


def vague_classes(tree: ast.Module) -> list[str]:
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return [node.name for node in classes if re.search(r"(Manager|Helper|Utils?|Mixin)$", node.name)]


def _at(node: ast.AST) -> str:
    return f"line {node.lineno}: {ast.unparse(node)[:80]}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", FILES, ids=short)
def test_a_file_obeys_the_house_rules(file: Path) -> None:
    name, source = short(file), file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert source.count("\n") <= 300
    assert long_functions(tree) == []
    assert vague_classes(tree) == []
    assert strays(name, tree) == []
    assert name in MAY_PRINT or prints(tree) == []
    assert name in MAY_CHANGE_MODELS or changes_models(tree) == []
    assert name in MAY_WRITE or writes(tree) == []


def test_the_package_is_there() -> None:
    assert {group(short(file)) for file in FILES} == {*ALLOWED, *FREE}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("site.py", "from peftsurgery.live.swap import swap"),
        ("site.py", "import peftsurgery"),
        ("methods/lora.py", "from peftsurgery.live import swap"),
        ("live/merge.py", "import peftsurgery.disk.writer"),
        ("disk/peft.py", "def f():\n    from peftsurgery.methods.lora import LoRA"),
        ("graph/merge.py", "from peftsurgery import live"),
        ("commands/merge.py", "from peftsurgery.cli import main"),
        ("cli.py", "from peftsurgery.live.surgery import inject"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, source: str) -> None:
    assert strays(file, ast.parse(source))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (prints, "print(1)", "report('print')"),
        (changes_models, "setattr(model, 'a', b)", "getattr(model, 'a')"),
        (changes_models, "parent.add_module('a', b)", "self.add_module('a', b)"),
        (changes_models, "parent._modules['a'] = b", "self._modules['a'] = b"),
        (changes_models, "del parent._modules['a']", "a = parent._modules['a']"),
        (changes_models, "parent._modules.update(a=b)", "parent._modules.get('a')"),
        (writes, "open(path, 'wb')", "open(path, 'rb')"),
        (writes, "path.open(mode='w')", "path.open()"),
        (writes, "path.write_text('a')", "path.read_text()"),
        (writes, "os.replace(a, b)", "name.replace('a', 'b')"),
        (long_functions, "def f():\n" + "    pass\n" * 40, "def f():\n" + "    pass\n" * 39),
        (long_functions, f"def f():\n{PROSE}" + "    pass\n" * 40, f"def f():\n{PROSE}" + "    pass\n" * 39),
        (vague_classes, "class ModelManager: ...", "class Managed: ..."),
    ],
)
def test_a_broken_rule_is_seen(rule: Rule, bad: str, good: str) -> None:
    assert rule(ast.parse(bad))
    assert not rule(ast.parse(good))


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime', 'onnxscript', 'peft'}"
    code = f"import sys, peftsurgery; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def texts() -> Iterator[Path]:
    """The text files of the project, without what tools leave behind."""
    generated = {".venv", ".git", ".hypothesis", "build", "dist", "__pycache__"}
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".sh", ""}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in generated and not name.endswith("_cache")]
        kept = (name for name in names if name not in generated)  # in a worktree .git is a file
        yield from (Path(folder, name) for name in kept if Path(name).suffix in kinds)


def test_no_text_names_a_path_of_a_build_machine() -> None:
    machine = re.compile(rb"(?<![\w.$}])/(root|work|farm)/")
    found = [file for file in texts() if machine.search(file.read_bytes())]
    assert found == []
    assert ROOT / "Makefile" in texts()
