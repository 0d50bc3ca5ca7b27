"""Keys of cache entries: a key can be parsed from its text, and no other text is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights.cache.cache import KEY_PATTERN
from weights.cache.cache_key import CacheKey

FINGERPRINT = "0123456789abcdef" * 4


def words(pattern: str) -> st.SearchStrategy[str]:
    return st.from_regex(pattern, fullmatch=True).filter(lambda word: len(word) < 20)


@given(
    part=words("[a-z]+[0-9]*"),
    device=words("[a-z0-9]+"),
    dtype=words("[a-z0-9]+"),
    weights=words("[a-z0-9]+"),
    rows=st.integers(1, 64),
    columns=st.integers(1, 64),
    transform=st.integers(0, 10**6),
    fingerprint=st.text("0123456789abcdef", min_size=64, max_size=64),
)
def test_a_name_is_read_back(
    *, part: str, device: str, dtype: str, weights: str, rows: int, columns: int, transform: int, fingerprint: str
) -> None:
    key = CacheKey(
        part=part,
        device=device,
        dtype=dtype,
        weights=weights,
        rows=rows,
        columns=columns,
        transform=transform,
        fingerprint=fingerprint,
    )
    assert CacheKey.parse(str(key)) == key
    assert KEY_PATTERN.fullmatch(str(key))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "notes",
        f"layer7-embedded-bfloat16-h8-1x1-{FINGERPRINT}",
        f"layer7-embedded-bfloat16-h8-1-v1-{FINGERPRINT}",
        f"layer7-embedded-bfloat16-1x1-v1-{FINGERPRINT}",
        f"layer7-embedded-bfloat16-h8-1x1-v1-{FINGERPRINT[1:]}",
        f"layer7-embedded-bfloat16-h8-1x1-v1-{FINGERPRINT.upper()}",
        f"layer7-embedded-bfloat16-h8-1x1-v1-{FINGERPRINT}.old",
        f".layer7-embedded-bfloat16-h8-1x1-v1-{FINGERPRINT}",
    ],
)
def test_other_names_are_none(text: str) -> None:
    assert CacheKey.parse(text) is None
