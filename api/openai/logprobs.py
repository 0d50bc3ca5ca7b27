"""The log-probabilities and token ids of a completion, in OpenAI's form and in vLLM's."""

from collections.abc import Iterable

import msgspec

from api.openai.choices import Prompt
from api.openai.protocol import CompletionRequest
from api.openai.responses import CompletionLogprobs, PromptLogprob, PromptLogprobs
from api.text.tokenizer import CHARACTER_BYTES_MAX, REPLACEMENT, TextTokenizer
from stages.step import VOCABULARY, TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM has the same number."""


class TokenTexts:
    """Finds the text of each token after those before it, special tokens included.

    As in vLLM, a token that ends within a character has none, and the one that ends the character has all of it, so
    that the texts of a sequence add up to the sequence's.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._unfinished: list[int] = []

    def texts_here(self, tokens: Iterable[int]) -> list[str]:
        """The text that each of these candidates would have at this position."""
        return [self._text(token) for token in tokens]

    def advance(self, token: int) -> None:
        """Moves on to the next position, as `token` stands at this one."""
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


class LegacyLogprobs:
    """Collects the entries of one choice's tokens, in OpenAI's form for completions, until a chunk takes them."""

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
        """Begins another text at this offset: the completion, after its prompt."""
        self._texts = TokenTexts(self._tokenizer)
        self._offset = offset

    def add_echoed_token(self, token: int, entry: TokenLogprobs | None) -> None:
        """Adds the next token of an echoed prompt, whose text has no special tokens; the first one has no entry."""
        [text] = self._texts.texts_here([token])
        self.add_token(token, entry, 0 if self._tokenizer.is_special(token) else len(text))

    def add_token(self, token: int, entry: TokenLogprobs | None, characters: int) -> None:
        """Adds the next token, which gave the text so many characters."""
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

    def take_logprobs(self) -> CompletionLogprobs:
        """Returns the entries since the last call."""
        taken = CompletionLogprobs(
            text_offset=self._offsets,
            token_logprobs=self._logprobs,
            tokens=self._tokens,
            top_logprobs=self._tops,
        )
        self._offsets, self._logprobs, self._tokens, self._tops = [], [], [], []
        return taken

    def _names(self, tokens: list[int]) -> list[str]:
        return [f"token_id:{token}" for token in tokens] if self._as_token_ids else self._texts.texts_here(tokens)


def joined_logprobs(parts: list[CompletionLogprobs]) -> CompletionLogprobs | None:
    """Joins the entries of all parts in their order; returns None without parts."""
    if not parts:
        return None
    return CompletionLogprobs(
        text_offset=[offset for part in parts for offset in part.text_offset],
        token_logprobs=[logprob for part in parts for logprob in part.token_logprobs],
        tokens=[token for part in parts for token in part.tokens],
        top_logprobs=[top for part in parts for top in part.top_logprobs],
    )


class PromptEntries:
    """Collects the log-probabilities of a prompt in vLLM's own form."""

    def __init__(self, tokenizer: TextTokenizer, count: int) -> None:
        """`count` best tokens go into each entry, VOCABULARY for all."""
        self._texts = TokenTexts(tokenizer)
        self._count = count
        self.entries: PromptLogprobs = []

    def add_entry(self, token: int, entry: TokenLogprobs | None) -> None:
        """Adds the prompt's next token; only the first one has no entry."""
        self.entries.append(None if entry is None else self._entry(token, entry))
        self._texts.advance(token)

    def _entry(self, token: int, entry: TokenLogprobs) -> dict[int, PromptLogprob]:
        count = len(entry.top_tokens) if self._count == VOCABULARY else self._count
        top = entry.top_tokens[:count]
        ranked = [(token, entry.logprob, entry.rank), *zip(top, entry.top_logprobs, range(1, count + 1), strict=False)]
        texts = self._texts.texts_here([token, *top])
        return {
            one: PromptLogprob(logprob=max(logprob, LOWEST), rank=rank, decoded_token=text)
            for (one, logprob, rank), text in zip(ranked, texts, strict=True)
        }


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The details of a chunk's tokens; what was not asked for is None or unset. The first chunk has the prompt's."""

    logprobs: CompletionLogprobs | None
    token_ids: list[int] | msgspec.UnsetType
    prompt_token_ids: list[int] | msgspec.UnsetType
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType


class TokenDetails:
    """Collects the details of one choice's tokens until its next chunk takes them."""

    def __init__(self, request: CompletionRequest, prompt: Prompt, tokenizer: TextTokenizer) -> None:
        self._prompt = prompt
        self._echoes = bool(request.echo)
        self._logprobs: LegacyLogprobs | None = None
        if request.logprobs is not None:
            self._logprobs = LegacyLogprobs(tokenizer, request.logprobs, request.return_tokens_as_token_ids or False)
        self._prompt_logprobs: PromptEntries | None = None
        if request.prompt_logprobs is not None:
            self._prompt_logprobs = PromptEntries(tokenizer, request.prompt_logprobs)
        self._token_ids: list[int] | None = [] if request.return_token_ids else None
        self._is_first = True
        self._scored = 0
        self._add_prompt_token(None)
        if len(prompt.tokens) == 1:
            self._end_prompt()

    @classmethod
    def asked(cls, request: CompletionRequest, prompt: Prompt, tokenizer: TextTokenizer) -> "TokenDetails | None":
        """Makes a collector of the details that a request asks for; None if it asks for text alone."""
        if request.logprobs is None and request.prompt_logprobs is None and not request.return_token_ids:
            return None
        return cls(request, prompt, tokenizer)

    def add_prompt_entries(self, entries: list[TokenLogprobs]) -> None:
        """Adds the entries of the prompt's next tokens, from its second one on."""
        for entry in entries:
            self._add_prompt_token(entry)
        if entries and self._scored == len(self._prompt.tokens):
            self._end_prompt()

    def add_token(self, token: int, entry: TokenLogprobs | None, characters: int) -> None:
        """Adds the completion's next token, which gave the text so many characters."""
        if self._logprobs is not None:
            self._logprobs.add_token(token, entry, characters)
        if self._token_ids is not None:
            self._token_ids.append(token)

    def take_details(self) -> Details:
        """Returns the details since the last call."""
        token_ids = msgspec.UNSET if self._token_ids is None else self._token_ids
        details = Details(
            logprobs=None if self._logprobs is None else self._logprobs.take_logprobs(),
            token_ids=token_ids,
            prompt_token_ids=self._prompt.tokens
            if self._is_first and token_ids is not msgspec.UNSET
            else msgspec.UNSET,
            prompt_logprobs=self._prompt_logprobs.entries
            if self._is_first and self._prompt_logprobs is not None
            else msgspec.UNSET,
        )
        self._is_first = False
        self._token_ids = None if self._token_ids is None else []
        return details

    def _add_prompt_token(self, entry: TokenLogprobs | None) -> None:
        token = self._prompt.tokens[self._scored]
        self._scored += 1
        if self._logprobs is not None and self._echoes:
            self._logprobs.add_echoed_token(token, entry)
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.add_entry(token, entry)

    def _end_prompt(self) -> None:
        if self._logprobs is not None:
            self._logprobs.begin(len(self._prompt.echo))
