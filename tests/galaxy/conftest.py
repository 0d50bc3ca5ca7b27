"""One mock Galaxy for all tests of a process: 4 rows of 8 chips, of which a mesh may use a part."""

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

# This has to be set before the first test imports ttnn.
if not ON_CHIPS:
    os.environ.update(mock_environment(FOLDER, range(ROWS), ROWS))
os.environ[DEVICE_VARIABLE] = "ttnn"
# Processes that tests start, including Ray's, have to find the tests' own modules from the scratch folder.
os.environ["PYTHONPATH"] = str(ROOT)


@pytest.fixture(scope="session", autouse=True)
def _scratch() -> Iterator[None]:
    """Runs tests in a scratch folder, as ttnn writes a folder `generated/` into the working directory."""
    before = Path.cwd()
    os.chdir(FOLDER)
    yield
    os.chdir(before)
    shutil.rmtree(FOLDER)
