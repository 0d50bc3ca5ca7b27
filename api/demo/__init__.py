"""The demo: prompts completed, and accuracy measured, without a server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api.demo.run import run_demo

__all__ = ["run_demo"]


def __getattr__(name: str) -> Any:
    """Imports `run_demo` when it is asked for: the command line reads the demo's options without running it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from api.demo import run  # noqa: PLC0415 - see above

    return run.run_demo
