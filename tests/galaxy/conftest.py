"""One mock Galaxy for all tests of a process: 4 rows of 8 chips, of which a mesh may take a part."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.device import DEVICE_VARIABLE
from tests import ROOT
from tests.galaxy.chips import ON_CHIPS
from tests.support.mock_galaxy.environment import mock_environment
from tests.support.mock_galaxy.wiring import ROWS

FOLDER = Path(tempfile.mkdtemp(prefix="galaxyline-mock-"))

# Before ttnn is imported, by whichever test comes first.
if not ON_CHIPS:
    os.environ.update(mock_environment(FOLDER, range(ROWS), ROWS))
os.environ[DEVICE_VARIABLE] = "ttnn"
# Processes that tests start, Ray's among them, find the tests' own modules from the scratch folder too.
os.environ["PYTHONPATH"] = str(ROOT)


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    """ttnn writes a folder `generated/` into the working directory."""
    before = Path.cwd()
    os.chdir(FOLDER)
    yield
    os.chdir(before)
    shutil.rmtree(FOLDER)
