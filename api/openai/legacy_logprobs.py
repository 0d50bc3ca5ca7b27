"""Log-probabilities as OpenAI's completions have them, token by token."""

from api.openai.responses import CompletionLogprobs
from api.openai.token_texts import TokenTexts
from api.text.tokenizer import TextTokenizer
from stages.step import VOCABULARY, TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's number."""


class LegacyLogprobs:
    """Gathers the entries of one choice's tokens and hands them out piece by piece."""

    def __init__(self, tokenizer: TextTokenizer, count: int, as_token_ids: bool) -> None:
        """`count` best tokens go into each entry, VOCABULARY for all; `as_token_ids` names tokens by id."""
        self._tokenizer = tokenizer
        self._count = count
        self._as_token_ids = as_token_ids
        self._offsets: list[int] = []
        self._logprobs: list[float | None] = []
        self._tokens: list[str] = []
        self._tops: list[dict[str, float] | None] = []
        self.begin(0)

    def begin(self, offset: int) -> None:
        """Another text begins at this offset: the completion, after its prompt."""
        self._texts = TokenTexts(self._tokenizer)
        self._offset = offset

    def add_echoed(self, token: int, entry: TokenLogprobs | None) -> None:
        """The next token of an echoed prompt, whose text leaves special tokens out; the first one has no entry."""
        [text] = self._texts.here([token])
        self.add(token, entry, 0 if self._tokenizer.is_special(token) else len(text))

    def add(self, token: int, entry: TokenLogprobs | None, characters: int) -> None:
        """The next token, which gave the answer's text so many characters."""
        self._offsets.append(self._offset)
        self._offset += characters
        if entry is None:
            self._tokens += self._names([token])
            self._logprobs.append(None)
            self._tops.append(None)
        else:
            self._add_scored(token, entry)
        self._texts.advance(token)

    def _add_scored(self, token: int, entry: TokenLogprobs) -> None:
        count = len(entry.top_tokens) if self._count == VOCABULARY else self._count
        name, *names = self._names([token, *entry.top_tokens[:count]])
        own = max(entry.logprob, LOWEST)
        top = {name: own}
        # The best come first: of several tokens with one name, the first is the one to keep.
        for other, logprob in zip(names, entry.top_logprobs, strict=False):
            if logprob > top.get(other, -float("inf")):
                top[other] = max(logprob, LOWEST)
        self._tokens.append(name)
        self._logprobs.append(own)
        self._tops.append(top)

    def take(self) -> CompletionLogprobs:
        """The entries since the last call."""
        taken = CompletionLogprobs(
            text_offset=self._offsets,
            token_logprobs=self._logprobs,
            tokens=self._tokens,
            top_logprobs=self._tops,
        )
        self._offsets, self._logprobs, self._tokens, self._tops = [], [], [], []
        return taken

    def _names(self, tokens: list[int]) -> list[str]:
        return [f"token_id:{token}" for token in tokens] if self._as_token_ids else self._texts.here(tokens)


def joined_logprobs(parts: list[CompletionLogprobs]) -> CompletionLogprobs | None:
    """The entries of all parts in their order; None without parts."""
    if not parts:
        return None
    return CompletionLogprobs(
        text_offset=[offset for part in parts for offset in part.text_offset],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        tokens=[token for part in parts for token in part.tokens],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
    )
