"""Weight matrices as a CPU multiplies fastest by them."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

PACKED_FROM = 1 << 18
"""Elements from which a packed matrix is faster, whatever the number of rows: under it, packing's overhead shows."""


class Matrix:
    """One weight [N, K], for products x [..., K] -> [..., N].

    A large one is packed into oneDNN's blocked layout at its first product: 1.2 to 3 times as fast as the plain one,
    for a second copy in memory. The plain one stays where it was, as a rule a mapped file whose pages can be dropped.
    """

    __slots__ = ("_packable", "_packed", "_plain")

    def __init__(self, plain: torch.Tensor) -> None:
        self._plain = plain
        self._packable = _is_packable(plain)
        self._packed: torch.Tensor | None = None

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] times this: [..., N]; in float32 where either of the two is."""
        plain = self._plain
        if x.dtype != plain.dtype:
            return F.linear(x.float(), plain.float())
        if not self._packable:
            return F.linear(x, plain)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous())
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


def _is_packable(plain: torch.Tensor) -> bool:
    if plain.numel() < PACKED_FROM or not torch._C._has_mkldnn:
        return False
    return plain.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
