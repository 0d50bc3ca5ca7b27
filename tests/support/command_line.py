"""Runs `galaxyline` in the test's own process."""

import pytest
from click.testing import CliRunner, Result

from api.cli import group, parameters

VARIABLES = (
    *("DEEPSEEK_V3_HF_MODEL", "HF_MODEL", "HF_HOME", "DEEPSEEK_V3_CACHE", "MESH_DEVICE", "RAY_ADDRESS"),
    *("COLUMNS", "GALAXYLINE_LOG_LEVEL"),
)


def run(*arguments: str, stdin: str | None = None, **environment: str) -> Result:
    """Runs the command with these arguments and this input; of the VARIABLES, only those given are set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "configure_logging", lambda: None)
        variables = {**dict.fromkeys(VARIABLES), **environment}
        return CliRunner().invoke(group.main, arguments, input=stdin, env=variables, prog_name="galaxyline")


def refused(*arguments: str, code: int = 2, **environment: str) -> str:
    """Returns the error of a command that must fail: the last line of stderr."""
    result = run(*arguments, **environment)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]
