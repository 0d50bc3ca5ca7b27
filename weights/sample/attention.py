"""An attention for transformers' models that trains faster on CPUs than its own, above all on long rows.

torch's fused attention needs values as wide as keys. Those of multi-head latent attention are narrower.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

PADDED = "padded_sdpa"
"""The name of this attention, for `attn_implementation`."""


def register() -> None:
    """Make the attention known to transformers, with the masks of its eager attention."""
    AttentionInterface.register(PADDED, _attend)
    AttentionMaskInterface.register(PADDED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_others: object,
) -> tuple[torch.Tensor, None]:
    width = value.shape[-1]
    padded = functional.pad(value, (0, query.shape[-1] - width))
    output = functional.scaled_dot_product_attention(query, key, padded, attn_mask=attention_mask, scale=scaling)
    return output[..., :width].transpose(1, 2).contiguous(), None
