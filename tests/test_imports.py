"""No test module imports another: what several share is in a conftest.py, in tests/support/ or in a module beside them.

import-linter holds that no source and no benchmark imports tests; it has no pattern for the names of test files.
"""

import ast
from collections.abc import Iterator

import pytest

from tests import ROOT


def imported_names(source: str) -> Iterator[str]:
    """The modules that a file imports, and the names that it imports from them, as `module.name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_tests(source: str) -> list[str]:
    """What a file imports that is a test module or in one."""
    return [name for name in imported_names(source) if any(part.startswith("test_") for part in name.split("."))]


def test_no_test_imports_a_test() -> None:
    found = {
        str(file.relative_to(ROOT)): imports_of_tests(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / "tests").rglob("*.py"))
    }
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "from tests.api.scheduler.test_scheduler import Machine",
        "from tests.api.scheduler import test_scheduler",
        "import tests.api.scheduler.test_scheduler",
    ],
)
def test_a_planted_import_of_a_test_is_found(planted: str) -> None:
    assert imports_of_tests(planted)
