"""Load balance of the routed experts without an auxiliary loss."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

BIAS_STEP = 0.001
"""The bias update speed, gamma, of the DeepSeek-V3 technical report (arXiv:2412.19437, section 4.2)."""


class BiasBalancer:
    """Counts the tokens of each expert in a training step and moves the router's correction bias against the load.

    The rule of arXiv:2412.19437, section 2.1.2: after a step the bias of an overloaded expert falls by BIAS_STEP and
    that of an underloaded one rises by it. The bias chooses experts only; it does not weigh their outputs.
    """

    def __init__(self, gate: nn.Module) -> None:
        bias = gate.get_buffer("e_score_correction_bias")
        self._bias: torch.Tensor = bias
        self._load = torch.zeros_like(bias, dtype=torch.int64)
        self._handle: RemovableHandle = gate.register_forward_hook(self._count)

    def step(self) -> None:
        """Move the bias by the load since the last step, and forget that load."""
        load = self._load.to(torch.float32)
        self._bias += BIAS_STEP * torch.sign(load.mean() - load)
        # Adding a constant to all biases changes no choice, and without this their mean drifts upwards.
        self._bias -= self._bias.mean()
        self._load.zero_()

    def close(self) -> None:
        """Leave the bias as it is from now on."""
        self._handle.remove()

    def _count(self, _gate: nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen = output[2].flatten()
        self._load += torch.bincount(chosen, minlength=len(self._load))


def balancers(model: nn.Module) -> list[BiasBalancer]:
    """Return one balancer for each router in `model`."""
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    return [BiasBalancer(gate) for gate in gates]
