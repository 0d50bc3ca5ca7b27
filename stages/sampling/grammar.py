"""Grammars that an answer has to follow: compiled by llguidance, and the tokens that each of them allows next.

llguidance (https://github.com/guidance-ai/llguidance) parses what an answer's tokens stand for by an Earley parser over
a lexer of regular-expression derivatives; a trie of all tokens gives those that can come next. A matcher is a function
of its source and of the tokens it has consumed, so that a request's can be made anew from its answer.
"""

from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from stages.errors import GrammarError

Mask = NDArray[np.bool_]
"""The tokens that may come next, [vocabulary]."""

LIMITS = LLParserLimits(
    # What one mask may cost: about ten milliseconds of one thread in derivatives, and one in the parser.
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_items_in_row=5_000,
    # A state takes one or two kilobytes, and each request has states of its own.
    max_lexer_states=30_000,
    max_grammar_size=100_000,
    # Otherwise its errors repeat the grammar.
    verbose_errors=False,
)
"""The bounds within which a grammar is compiled and followed; the same wherever it is, so that it fails nowhere or
everywhere."""

COMPILED_MAX = 128
"""Grammars that are kept compiled, those used last: each may take megabytes."""

ERROR_CHARACTERS_MAX = 300
"""The most characters of the library's errors that are shown: they repeat the grammar."""


def compile_grammar(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """A matcher that has consumed nothing, and computed its first mask. Raises GrammarError where there is none.

    Takes milliseconds, or up to seconds for a grammar that nobody has checked; other threads run meanwhile.
    """
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LIMITS)
    # Copies have it then too, and what it costs.
    allowed_tokens(matcher, vocabulary.vocab_size)
    return matcher


def allowed_tokens(matcher: LLMatcher, size: int) -> Mask:
    """The tokens below `size` that may come next; EOS where the answer may end. Other threads run meanwhile.

    Raises GrammarError where the matcher has failed, or fails over this.
    """
    refuse_failed(matcher)
    mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    # A matcher that fails over it gives EOS alone.
    refuse_failed(matcher)
    allowed = np.zeros(size, dtype=np.bool_)
    allowed[: len(mask)] = mask[:size]
    if not allowed.any():
        raise GrammarError("No token of the model can continue the answer.")
    return allowed


def refuse_failed(matcher: LLMatcher) -> None:
    """Raises GrammarError, with the library's reason, where a matcher has failed."""
    if matcher.is_error():
        raise GrammarError(" ".join(matcher.get_error().split())[:ERROR_CHARACTERS_MAX])


class GrammarCompiler:
    """Compiles grammars, and keeps those that were used last. For one thread."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self.vocabulary = vocabulary
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, source: str) -> LLMatcher:
        """A matcher of the grammar, of the caller's own. Raises GrammarError as `compile_grammar` does."""
        compiled = self._compiled.pop(source, None)
        if compiled is None:
            compiled = compile_grammar(self.vocabulary, source)
        self._compiled[source] = compiled
        if len(self._compiled) > COMPILED_MAX:
            self._compiled.popitem(last=False)
        return compiled.deep_copy()
