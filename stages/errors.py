"""Errors of planning and running stages."""

from weights.errors import GalaxylineError


class PlanError(GalaxylineError):
    """A plan that is not possible, such as a split of layers; the sentence has the numbers and what would work."""


class StepError(GalaxylineError):
    """A step that contradicts a stage's state, such as a segment without blocks: a defect of the sender."""


class DeviceError(GalaxylineError):
    """A request that a device, mesh or op refused."""


class GrammarError(GalaxylineError):
    """A grammar that cannot be compiled, or not be followed any further; the sentence has the reason."""
