"""Errors of planning and running stages."""

from weights.errors import GalaxylineError


class PlanError(GalaxylineError):
    """Layers cannot be split as asked; the sentence gives the numbers and what would work."""


class StepError(GalaxylineError):
    """A step contradicts a stage's state, such as a segment without blocks; it is a defect of the sender."""


class DeviceError(GalaxylineError):
    """A device, mesh or op refused what it was asked."""
