"""Text of a growing token sequence, piece by piece, never cut within a character."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

CHARACTER_BYTES_MAX = 4
"""Bytes of the longest UTF-8 character (RFC 3629), hence the most tokens that one character can take."""

HELD_TOKENS_MAX = 16
"""Tokens held back in the hope of a whole character; more than this are bytes that form none."""


class IncrementalDecoder:
    """Turns one sequence's tokens into text as they come; special tokens and ids without a token give none.

    Bytes that end a sequence within a character are left out. Bytes that can be no character become U+FFFD, as in
    `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, silent: frozenset[int]) -> None:
        """`silent` are the special tokens' ids that shall give no text."""
        self._tokenizer = tokenizer
        self._silent = silent
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def add(self, token: int) -> str | None:
        """The text that `token` completes: None while a character is short of bytes, empty for a token without text."""
        if token in self._silent or self._tokenizer.id_to_token(token) is None:
            return ""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is not None:
            if self._held:
                self._held.clear()
            return text
        self._held.append(token)
        return None if len(self._held) < HELD_TOKENS_MAX else self._release()

    def flush(self) -> str:
        """What can be read of the tokens held back, when no more will come: all but an unfinished character."""
        text = self._decode(self._held).rstrip(REPLACEMENT)
        self._held.clear()
        return text

    def _release(self) -> str | None:
        # Without this, a model that repeats one byte would never show any text, and each step would cost more than
        # the one before: the stream decodes all tokens it holds.
        whole = self._decode(self._held)
        for kept in range(CHARACTER_BYTES_MAX - 1, len(self._held)):
            text = self._decode(self._held[:-kept])
            if text + self._decode(self._held[-kept:]) == whole:
                self._held = self._held[-kept:]
                self._stream = DecodeStream(ids=self._held, skip_special_tokens=False)
                return text
        return None

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text
