"""What a client may ask to know of the tokens of a choice, beside their text."""

import msgspec

from api.openai.legacy_logprobs import LOWEST, LegacyLogprobs
from api.openai.prompts import Prompt
from api.openai.protocol import CompletionRequest
from api.openai.responses import CompletionLogprobs, PromptLogprob, PromptLogprobs
from api.openai.token_texts import TokenTexts
from api.text.tokenizer import TextTokenizer
from stages.step import VOCABULARY, TokenLogprobs


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The details of a piece's tokens; what was not asked for is None or unset. The prompt's are in the first piece."""

    logprobs: CompletionLogprobs | None
    token_ids: list[int] | msgspec.UnsetType
    prompt_token_ids: list[int] | msgspec.UnsetType
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType


class TokenDetails:
    """Gathers the details of one choice until its next piece takes them."""

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
        """The details that a request asks for; None if it wants text alone."""
        if request.logprobs is None and request.prompt_logprobs is None and not request.return_token_ids:
            return None
        return cls(request, prompt, tokenizer)

    def add_prompt(self, entries: list[TokenLogprobs]) -> None:
        """The entries of the prompt's next tokens, from its second one on."""
        for entry in entries:
            self._add_prompt_token(entry)
        if entries and self._scored == len(self._prompt.tokens):
            self._end_prompt()

    def add(self, token: int, entry: TokenLogprobs | None, characters: int) -> None:
        """The completion's next token, which gave the text so many characters."""
        if self._logprobs is not None:
            self._logprobs.add(token, entry, characters)
        if self._token_ids is not None:
            self._token_ids.append(token)

    def take(self) -> Details:
        """The details since the last call."""
        token_ids = msgspec.UNSET if self._token_ids is None else self._token_ids
        details = Details(
            logprobs=None if self._logprobs is None else self._logprobs.take(),
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
            self._logprobs.add_echoed(token, entry)
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.add(token, entry)

    def _end_prompt(self) -> None:
        if self._logprobs is not None:
            self._logprobs.begin(len(self._prompt.echo))


class PromptEntries:
    """The log-probabilities of a prompt in vLLM's own form."""

    def __init__(self, tokenizer: TextTokenizer, count: int) -> None:
        """`count` best tokens go into each entry, VOCABULARY for all."""
        self._texts = TokenTexts(tokenizer)
        self._count = count
        self.entries: PromptLogprobs = []

    def add(self, token: int, entry: TokenLogprobs | None) -> None:
        """The prompt's next token; only the first one has no entry."""
        self.entries.append(None if entry is None else self._entry(token, entry))
        self._texts.advance(token)

    def _entry(self, token: int, entry: TokenLogprobs) -> dict[int, PromptLogprob]:
        count = len(entry.top_tokens) if self._count == VOCABULARY else self._count
        top = entry.top_tokens[:count]
        ranked = [(token, entry.logprob, entry.rank), *zip(top, entry.top_logprobs, range(1, count + 1), strict=False)]
        texts = self._texts.here([token, *top])
        return {
            one: PromptLogprob(logprob=max(logprob, LOWEST), rank=rank, decoded_token=text)
            for (one, logprob, rank), text in zip(ranked, texts, strict=True)
        }
