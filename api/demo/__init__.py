"""The demo: prompts completed, and accuracy measured, without a server."""

from api.demo.run import run_demo

__all__ = ["run_demo"]
