"""SplitMix64 in Python's integers, forwards and backwards; it uses nothing of the code under test."""

WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15


def output_of(key: int, token: int) -> int:
    """Output number `token` after the state `key`."""
    state = (key + (token + 1) * GAMMA) % WORD
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return state ^ (state >> 31)


def key_with(output: int, token: int) -> int:
    """The key with which `token` gets `output`."""
    state = _unshifted(output, 31) * pow(0x94D049BB133111EB, -1, WORD) % WORD
    state = _unshifted(state, 27) * pow(0xBF58476D1CE4E5B9, -1, WORD) % WORD
    return (_unshifted(state, 30) - (token + 1) * GAMMA) % WORD


def _unshifted(value: int, shift: int) -> int:
    """The number whose exclusive or with itself shifted by `shift` is `value`."""
    found = value
    for _ in range(64 // shift):
        found = value ^ (found >> shift)
    return found
