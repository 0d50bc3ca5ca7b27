"""What the tokens of one sequence are called where each of them is named by its text."""

from collections.abc import Iterable

from api.text.incremental_decoder import CHARACTER_BYTES_MAX, REPLACEMENT
from api.text.tokenizer import TextTokenizer


class TokenTexts:
    """The text of each token after those before it, special tokens included.

    As in vLLM, a token that ends within a character has none, and the one that ends the character has all of it, so
    that the texts of a sequence add up to the sequence's.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._unfinished: list[int] = []

    def here(self, tokens: Iterable[int]) -> list[str]:
        """The texts that each of these candidates would have at this position."""
        return [self._text(token) for token in tokens]

    def advance(self, token: int) -> None:
        """`token` is the one that stands at this position; the next one comes."""
        if not self._tokenizer.token_text(token).endswith(REPLACEMENT) or self._text(token):
            self._unfinished.clear()
        else:
            self._unfinished = [*self._unfinished, token][-CHARACTER_BYTES_MAX:]

    def _text(self, token: int) -> str:
        alone = self._tokenizer.token_text(token)
        if not alone.endswith(REPLACEMENT):
            return alone
        for count in range(1, len(self._unfinished) + 1):
            text = self._tokenizer.decode([*self._unfinished[-count:], token], skip_special_tokens=False)
            if not text.endswith(REPLACEMENT):
                return text
        return ""
