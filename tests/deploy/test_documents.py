"""The documents agree with this repository: the tests and files that they name, and the flags of the demo."""

import ast
import functools
import re
from pathlib import Path

import pytest

from api.cli.group import main
from tests import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
A_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
A_LINK = re.compile(r"\]\(([^)#:]+)\)")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))


@functools.cache
def functions_of(file: Path) -> set[str]:
    if not file.is_file():
        return set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@documents
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = A_TEST.findall(document.read_text(encoding="utf-8"))
    assert [f"{file}::{test}" for file, test in named if test not in functions_of(ROOT / file)] == []


@documents
def test_every_file_that_is_linked_exists(document: Path) -> None:
    linked = A_LINK.findall(document.read_text(encoding="utf-8"))
    assert [path for path in linked if not (document.parent / path).exists()] == []


def test_every_row_of_the_way_from_tt_metal_names_a_test() -> None:
    lines = (ROOT / "docs" / "from_tt_metal.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("| there |", "|---"))]
    assert len(rows) > 80
    assert [row for row in rows if not re.search(r"`tests/[a-z0-9_/]*test_", row.split("|")[-2])] == []


def test_every_flag_of_the_demo_alone_is_in_its_document() -> None:
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    shared = {name for parameter in main.commands["serve"].params for name in parameter.opts}
    flags = {name for parameter in main.commands["demo"].params for name in parameter.opts if name.startswith("--")}
    assert sorted(flag for flag in flags - shared if not re.search(rf"`{flag}[` ]", text)) == []
