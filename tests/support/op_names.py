"""The names of the embedded device's functions in ttnn."""

import types
from collections.abc import Iterator

from stages.backend import embedded
from stages.backend.embedded import deepseek_prefill, experimental, transformer


def _functions() -> Iterator[tuple[str, types.FunctionType]]:
    modules = {
        "": embedded,
        "experimental.": experimental,
        "experimental.deepseek_prefill.": deepseek_prefill,
        "transformer.": transformer,
    }
    for prefix, module in modules.items():
        for name in module.__all__:
            function = getattr(module, name)
            if isinstance(function, types.FunctionType):
                yield prefix + name, function


OPS = dict(_functions())
"""Functions by their names; synonyms have the same function."""
