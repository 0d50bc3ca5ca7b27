"""The log-probabilities and token ids of a completion, in OpenAI's form and in vLLM's."""

from collections.abc import Iterable

import msgspec

from api.openai.generation import DetailOptions
from api.openai.prompts import Prompt
from api.text.tokenizer import CHARACTER_BYTES_MAX, REPLACEMENT, TextTokenizer
from stages.step import VOCABULARY, TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM has the same number."""


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in the form of OpenAI's completions: four lists with an entry for each token.

    `text_offset` counts characters of the answer's text before the token. `top_logprobs` are by text, the token's own
    among them; of tokens with the same text the best is given. The prompt's first token has no log-probabilities.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class ChatTopEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One of the best tokens at a position; `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatEntry(msgspec.Struct, frozen=True, kw_only=True):
    """The token at a position, and the best ones there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopEntry]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in the form of OpenAI's chat: an entry for each token of the answer, thoughts included."""

    content: list[ChatEntry]
    refusal: None = None


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's entry for one token at one position of a prompt; `rank` 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""The entries of each token of a prompt, by token id, its own first; None for the first token."""


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


class CompletionEntries:
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


class ChatEntries:
    """Collects the entries of one choice's tokens, in OpenAI's form for chat, until a chunk takes them."""

    def __init__(self, tokenizer: TextTokenizer, count: int, as_token_ids: bool) -> None:
        """`count` best tokens go into each entry, VOCABULARY for all; `as_token_ids` names tokens by id."""
        self._count = count
        self._as_token_ids = as_token_ids
        self._texts = TokenTexts(tokenizer)
        self._entries: list[ChatEntry] = []

    def add_token(self, token: int, entry: TokenLogprobs) -> None:
        """Adds the next token."""
        count = len(entry.top_tokens) if self._count == VOCABULARY else self._count
        own, *best = self._named([token, *entry.top_tokens[:count]], [entry.logprob, *entry.top_logprobs[:count]])
        self._entries.append(ChatEntry(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=best))
        self._texts.advance(token)

    def take_logprobs(self) -> ChatLogprobs:
        """Returns the entries since the last call."""
        taken, self._entries = ChatLogprobs(content=self._entries), []
        return taken

    def _named(self, tokens: list[int], logprobs: list[float]) -> list[ChatTopEntry]:
        texts = self._texts.texts_here(tokens)
        names = [f"token_id:{token}" for token in tokens] if self._as_token_ids else texts
        return [
            ChatTopEntry(token=name, logprob=max(logprob, LOWEST), bytes=list(text.encode()))
            for name, text, logprob in zip(names, texts, logprobs, strict=True)
        ]


def _joined_completion_logprobs(parts: list[CompletionLogprobs]) -> CompletionLogprobs | None:
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

    completion_logprobs: CompletionLogprobs | None
    chat_logprobs: ChatLogprobs | None
    token_ids: list[int] | msgspec.UnsetType
    prompt_token_ids: list[int] | msgspec.UnsetType
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType


class TokenDetails:
    """Collects the details of one choice's tokens until its next chunk takes them."""

    def __init__(self, options: DetailOptions, prompt: Prompt, tokenizer: TextTokenizer) -> None:
        self._prompt = prompt
        self._echoes = options.echoes
        self._completion: CompletionEntries | None = None
        self._chat: ChatEntries | None = None
        if options.logprobs is not None and options.form == "completion":
            self._completion = CompletionEntries(tokenizer, options.logprobs, options.as_token_ids)
        elif options.logprobs is not None:
            self._chat = ChatEntries(tokenizer, options.logprobs, options.as_token_ids)
        self._prompt_logprobs: PromptEntries | None = None
        if options.prompt_logprobs is not None:
            self._prompt_logprobs = PromptEntries(tokenizer, options.prompt_logprobs)
        self._token_ids: list[int] | None = [] if options.token_ids else None
        self._is_first = True
        self._scored = 0
        self._add_prompt_token(None)
        if len(prompt.tokens) == 1:
            self._end_prompt()

    def add_prompt_entries(self, entries: list[TokenLogprobs]) -> None:
        """Adds the entries of the prompt's next tokens, from its second one on."""
        for entry in entries:
            self._add_prompt_token(entry)
        if entries and self._scored == len(self._prompt.tokens):
            self._end_prompt()

    def add_token(self, token: int, entry: TokenLogprobs | None, characters: int) -> None:
        """Adds the completion's next token, which gave the text so many characters."""
        if self._completion is not None:
            self._completion.add_token(token, entry, characters)
        if self._chat is not None and entry is not None:
            self._chat.add_token(token, entry)
        if self._token_ids is not None:
            self._token_ids.append(token)

    def take_details(self) -> Details:
        """Returns the details since the last call."""
        token_ids = msgspec.UNSET if self._token_ids is None else self._token_ids
        details = Details(
            completion_logprobs=None if self._completion is None else self._completion.take_logprobs(),
            chat_logprobs=None if self._chat is None else self._chat.take_logprobs(),
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
        if self._completion is not None and self._echoes:
            self._completion.add_echoed_token(token, entry)
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.add_entry(token, entry)

    def _end_prompt(self) -> None:
        if self._completion is not None:
            self._completion.begin(len(self._prompt.echo))


def joined_details(parts: list[Details]) -> Details | None:
    """Joins the details of chunks of a choice in their order; returns None without parts."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    first = parts[0]
    return msgspec.structs.replace(
        first,
        completion_logprobs=_joined_completion_logprobs(
            [part.completion_logprobs for part in parts if part.completion_logprobs is not None]
        ),
        chat_logprobs=None
        if first.chat_logprobs is None
        else ChatLogprobs(
            content=[entry for part in parts if part.chat_logprobs is not None for entry in part.chat_logprobs.content]
        ),
        token_ids=msgspec.UNSET
        if first.token_ids is msgspec.UNSET
        else [token for part in parts for token in part.token_ids or []],
    )
