"""What one request's grammar and thought allow as its next token: a function of its answer's tokens."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from stages.errors import GrammarError
from stages.sampling.grammar import GrammarCompiler, Mask, allowed_tokens, refuse_failed
from stages.sampling.thought import ThoughtState
from stages.step import SamplingParams


class Constraint:
    """The tokens that may come next, after those that were noted. For one thread at a time.

    Inside a thought whose answer has a grammar no EOS is drawn: it would end the answer before it began.
    """

    def __init__(
        self, sampling: SamplingParams, answer: Sequence[int], size: int, compiler: GrammarCompiler | None
    ) -> None:
        """`answer` are the request's tokens after its prompt, `size` is the number of tokens that have logits.

        `compiler` is None where requests can have no grammar. Raises GrammarError where this one's fails.
        """
        self._size = size
        self._compiler = compiler
        self._source = None if sampling.grammar is None else sampling.grammar.source
        self._thought = None if sampling.thought is None else ThoughtState(sampling.thought)
        # What may begin with the thought's first tokens or with the grammar's has a matcher from the beginning on.
        self._matcher = self._new_matcher() if self._phase != "inside" else None
        for token in answer:
            self.note(token)

    def note(self, token: int) -> None:
        """Takes in the answer's next token. Raises GrammarError where the grammar does not have it."""
        before = self._phase
        if self._thought is not None:
            self._thought.note(token)
        if self._source is None or before == "inside":
            if before == "inside" and self._phase == "after":
                self._matcher = self._new_matcher()
            return
        if before == "before" and self._phase != "after":
            # It belongs to the thought's beginning; the grammar may have it too.
            self._matcher = self._if_allowed(token) if self._phase == "before" else None
            return
        self._consume(token)

    def allowed(self) -> Mask | None:
        """The tokens that may come next, [vocabulary]; None for all. Raises GrammarError where there are none."""
        thought = self._thought
        if thought is None or thought.phase == "after":
            return self._of_grammar()
        if (forced := thought.forced_token) is not None:
            return self._only(forced)
        if thought.phase == "inside":
            return self._all_but(self._eos) if self._source is not None else None
        forbidden = thought.forbidden_token
        if self._source is None:
            return None if forbidden is None else self._all_but([forbidden])
        allowed = self._of_grammar() if self._matcher is not None else np.zeros(self._size, dtype=np.bool_)
        opening = thought.opening_token
        if allowed is not None and opening is not None and forbidden is None and opening < self._size:
            allowed[opening] = True
        return allowed

    @property
    def _phase(self) -> str:
        return "after" if self._thought is None else self._thought.phase

    @property
    def _vocabulary(self) -> LLTokenizer:
        if self._compiler is None:
            raise GrammarError("The last stage does not know what its tokens stand for.")
        return self._compiler.vocabulary

    @property
    def _eos(self) -> list[int]:
        return self._vocabulary.eos_tokens

    def _new_matcher(self) -> LLMatcher | None:
        if self._source is None:
            return None
        if self._compiler is None:
            raise GrammarError("The last stage does not know what its tokens stand for.")
        return self._compiler.matcher(self._source)

    def _if_allowed(self, token: int) -> LLMatcher | None:
        """The matcher after `token`; None where the grammar does not have that."""
        matcher = self._matcher
        return matcher if matcher is not None and matcher.try_consume_tokens([token]) == 1 else None

    def _consume(self, token: int) -> None:
        if self._matcher is None:
            raise GrammarError(f"Token {token} neither begins a thought nor follows the grammar.")
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            refuse_failed(self._matcher)

    def _of_grammar(self) -> Mask | None:
        return None if self._matcher is None else allowed_tokens(self._matcher, self._size)

    def _only(self, token: int) -> Mask:
        mask = np.zeros(self._size, dtype=np.bool_)
        mask[token] = True
        return mask

    def _all_but(self, tokens: Sequence[int]) -> Mask:
        mask = np.ones(self._size, dtype=np.bool_)
        mask[[token for token in tokens if token < self._size]] = False
        return mask
