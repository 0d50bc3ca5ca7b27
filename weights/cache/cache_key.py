"""Keys of the weight cache, which contain everything that the files of an entry follow from."""

import re

import msgspec

FINGERPRINT = r"[0-9a-f]{64}"
"""The pattern of a fingerprint in hexadecimal digits."""

_PATTERN = re.compile(
    r"(?P<part>[a-z]+[0-9]*)-(?P<device>[a-z0-9]+)-(?P<dtype>[a-z0-9]+)-(?P<weights>[a-z0-9]+)"
    rf"-(?P<rows>[0-9]+)x(?P<columns>[0-9]+)-v(?P<transform>[0-9]+)-(?P<fingerprint>{FINGERPRINT})"
)


class CacheKey(msgspec.Struct, frozen=True, kw_only=True):
    """The key of one part of a model, converted for one kind of mesh.

    `part` is "embedding", "head", "layer7" or "mtp61"; `dtype` is that in which floats are held, and `weights` that of
    each weight on chips, a letter each; `rows` x `columns` is the mesh, `transform` the version of the code that
    converts, and `fingerprint` the hash of the part's tensors and of the model's config.
    """

    part: str
    device: str
    dtype: str
    weights: str
    rows: int
    columns: int
    transform: int
    fingerprint: str

    def __str__(self) -> str:
        mesh = f"{self.rows}x{self.columns}"
        return f"{self.part}-{self.device}-{self.dtype}-{self.weights}-{mesh}-v{self.transform}-{self.fingerprint}"

    @classmethod
    def parse(cls, text: str) -> "CacheKey | None":
        """Parses the text that `str` makes of a key; returns None for any other text."""
        match = _PATTERN.fullmatch(text)
        return None if match is None else msgspec.convert(match.groupdict(), cls, strict=False)
