"""`python -m tests.galaxy.op_table` writes ttnn's column of the table in docs/ops.md again, on a mock Galaxy."""

import tests.galaxy.conftest  # noqa: F401 - sets the environment before ttnn is imported
from tests.support.op_table import write

if __name__ == "__main__":
    write()
