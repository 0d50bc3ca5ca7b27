"""How long collectives between chips of a Galaxy take: a fixed part, one for each hop, and bytes over bandwidth.

The constants are those that TT-Metal's report fits to its measurements of Wormhole chips in a line with one link
between neighbours (tech_reports/CCLs/CCL_bandwidth.md and results/SUMMARY_wormhole_b0_bfloat16_6144.md, which states
misses of 2 % to 28 %). A Galaxy has four links, which the bandwidth is multiplied by; that was not measured there.
"""

import msgspec

from stages.wormhole import HOP_S, LINK_BYTES_PER_S, LINKS


class CollectiveCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one call on N chips: `fixed_s` + `hop_s` * (N - 1) + bytes over the busiest link / bandwidth."""

    fixed_s: float
    hop_s: float
    bytes_per_s: float

    def seconds(self, chips: int, busiest_link_bytes: float) -> float:
        """Nothing on an axis of one chip."""
        if chips == 1:
            return 0.0
        return self.fixed_s + self.hop_s * (chips - 1) + busiest_link_bytes / (self.bytes_per_s * LINKS)


ALL_GATHER = CollectiveCost(fixed_s=4.47e-6, hop_s=1.91e-6, bytes_per_s=11.8e9)
REDUCE_SCATTER = CollectiveCost(fixed_s=3.23e-6, hop_s=3.97e-6, bytes_per_s=11.1e9)
ALL_REDUCE = CollectiveCost(fixed_s=9.07e-6, hop_s=5.82e-6, bytes_per_s=10.9e9)
ALL_TO_ALL = CollectiveCost(fixed_s=2.99e-6, hop_s=2.14e-6, bytes_per_s=7.6e9)


def all_gather_s(chips: int, input_bytes: float) -> float:
    """Of as many bytes from each chip."""
    return ALL_GATHER.seconds(chips, (chips - 1) * input_bytes)


def reduce_scatter_s(chips: int, input_bytes: float) -> float:
    """Of partial sums of as many bytes on each chip."""
    return REDUCE_SCATTER.seconds(chips, (chips - 1) / chips * input_bytes)


def all_reduce_s(chips: int, input_bytes: float) -> float:
    """Of partial sums of as many bytes on each chip."""
    return ALL_REDUCE.seconds(chips, 2 * (chips - 1) / chips * input_bytes)


def all_to_all_s(chips: int, input_bytes: float) -> float:
    """Of as many bytes on each chip; those for distant chips pass through the ones between."""
    return ALL_TO_ALL.seconds(chips, (chips // 2) * (chips - chips // 2) / chips * input_bytes)


def hop_s(distance: int, chip_bytes: float) -> float:
    """From a stage to the next over one link: each chip sends `chip_bytes`, and `distance` rows share a column."""
    return HOP_S * distance + distance * chip_bytes / LINK_BYTES_PER_S
