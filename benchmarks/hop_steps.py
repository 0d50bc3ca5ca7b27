"""Steps whose hidden states have the sizes of DeepSeek-V3's, and the terms of links that carry them."""

import secrets

import msgspec

from actors.sockets.host import Terms
from stages.step import Mode, Segment, Step

BYTES_PER_TOKEN = 2 * 7168
"""A hidden state of DeepSeek-V3 in bfloat16."""

DTYPE = "bfloat16"
DECODED_MAX = 32
"""Users of a decode step; more tokens than this are one prompt's chunk."""

EPOCH = 1


class Secret(msgspec.Struct, frozen=True):
    """What the processes of one run know each other by."""

    value: bytes

    @classmethod
    def new(cls) -> "Secret":
        """One that nobody can guess."""
        return cls(secrets.token_bytes(32))

    def terms(self, name: str, peer: str) -> Terms:
        """The terms of a link that carries hidden states."""
        return Terms(epoch=EPOCH, secret=self.value, name=name, peer=peer, dtype=DTYPE, bytes_per_token=BYTES_PER_TOKEN)


def step_of(step_id: int, tokens: int) -> Step:
    """A decode step of one token for each of up to DECODED_MAX users, or a chunk of a prompt."""
    is_decode = tokens <= DECODED_MAX
    parts = [[7]] * tokens if is_decode else [list(range(tokens))]
    segments = [
        Segment(slot=slot, start=512, tokens=part, new_blocks=[], sample=True) for slot, part in enumerate(parts)
    ]
    mode: Mode = "decode" if is_decode else "prefill"
    return Step(epoch=EPOCH, step_id=step_id, mode=mode, segments=segments, admissions=[], ended=[])
