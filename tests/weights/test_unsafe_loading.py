"""Neither a file nor a peer can make this program run foreign code."""

import ast
import functools
from pathlib import Path

from tests import ROOT

PACKAGES = ("actors", "api", "benchmarks", "stages", "weights")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
UNSAFE_MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve", "yaml"}
ONLY_ITS_ERROR = ROOT / "api" / "demo" / "reference.py"
"""torch.load raises pickle's own error for a file that is not a reference file; tests use nothing else of it."""


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


def test_nothing_imports_a_format_that_can_hold_code() -> None:
    assert [path for path in FILES if _imports(path) & UNSAFE_MODULES] == [ONLY_ITS_ERROR]
    used = {
        node.attr
        for node in _nodes(ONLY_ITS_ERROR)
        if isinstance(node, ast.Attribute) and _is_name(node.value, "pickle")
    }
    assert used == {"UnpicklingError"}


def test_torch_loads_weights_alone_and_no_models_code_is_trusted() -> None:
    for path in FILES:
        for node in _nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                values = {keyword.arg: keyword.value for keyword in node.keywords}
                if node.func.attr == "load" and _is_name(node.func.value, "torch"):
                    assert ast.unparse(values["weights_only"]) == "True", path
                assert ast.unparse(values.get("trust_remote_code", ast.Constant(False))) == "False", path


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
