"""What a stage server needs of a stage: so few methods that tests can run without a model."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

from actors.errors import StartError
from stages.kv.inventory import Inventory
from stages.mesh_spec import HiddenShard, MeshHidden
from stages.options import StageOptions
from stages.pending import StageOutput
from stages.plan import StageSpec
from stages.step import Step

OnProgress = Callable[[int, int], None]
"""Called with (layers loaded, layers)."""


class StageRunner(Protocol):
    """Computes one stage's part of every step, always called by the same thread."""

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        """Runs one step.

        `hidden` holds the bytes of [step.token_count, hidden_size], empty for the first stage; it may be written to
        and is valid during the call and while what is returned is sent. Returns the bytes to send on, which the
        runner must not write to again (`hidden` itself will do), or on the last stage the sampled tokens, or what draws
        them beside the next step without `hidden`. A runner that has sent hidden states on itself returns what it has
        sent.
        """

    def load_blocks(self, step: Step) -> list[int]:
        """Brings back the blocks of a load step; returns the indices of the `loads` that are not to be had."""

    def inventory(self, version: int) -> Inventory:
        """Returns what is kept beside the device, or what changed of it since a version; from any thread."""

    def close(self) -> None:
        """Releases devices and memory."""


class MeshRunner(Protocol):
    """Computes one stage's part of every step on its mesh, where hidden states come from and go to other meshes."""

    mesh_device: Any
    """The open mesh."""

    def hidden_spec(self) -> MeshHidden:
        """Returns the mesh's shape and the hidden states on it, the same on all stages of a pipeline."""

    def step_hidden_spec(self, step: Step) -> HiddenShard | None:
        """Returns what the step finds and leaves on each chip; None for a step without tokens."""

    def step_on_mesh(self, step: Step, hidden: Any) -> Any:
        """Runs one step on device tensors.

        `hidden` has the spec of `step_hidden_spec`; it is None on the first stage or without tokens. Returns a tensor
        of the same spec for the next stage, or on the last stage a StepResult or PendingResult.
        """

    def load_blocks(self, step: Step) -> list[int]:
        """See `StageRunner`."""

    def inventory(self, version: int) -> Inventory:
        """See `StageRunner`."""

    def close(self) -> None:
        """Releases devices and memory."""


class WithoutBlocks:
    """The part of a runner that has no cache: every block is there, as nothing is in it."""

    def load_blocks(self, step: Step) -> list[int]:
        """See `StageRunner`."""
        return []

    def inventory(self, version: int) -> Inventory:
        """See `StageRunner`."""
        return Inventory(version=version, is_whole=False, added=[], removed=[])


RunnerFactory = Callable[[StageSpec, StageOptions, OnProgress], StageRunner]


def runner_factory(path: str) -> RunnerFactory:
    """Imports "module:attribute", where the attribute may be dotted. Raises StartError if it does not exist."""
    module_name, _, attributes = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for name in attributes.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise StartError(f"Cannot import the stage runner {path}: {error}.") from error
    return cast("RunnerFactory", found)
