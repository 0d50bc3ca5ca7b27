"""The formats in which a model writes thoughts and tool calls, and the cutting of its text at their tags."""

import re
from collections.abc import Iterator, Sequence

import msgspec

from api.settings.chat import ReasoningParser, ToolCallParser

THINK = "<think>"
END_THINK = "</think>"
THOUGHT_TAGS = (THINK, END_THINK)

CALLS = "<｜tool▁calls▁begin｜>"
END_CALLS = "<｜tool▁calls▁end｜>"
CALL = "<｜tool▁call▁begin｜>"
END_CALL = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
TOOL_TAGS = (
    CALLS,
    END_CALLS,
    CALL,
    END_CALL,
    SEPARATOR,
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
"""All tags of tools. Those of outputs stand in prompts; a model that makes up a result writes them too."""

ASSISTANT = "<｜Assistant｜>"

FENCED_CALL = re.compile(SEPARATOR + ".{0,150}```", re.DOTALL)
"""How a template writes a call in V3's format: the fence stands a few characters behind the separator."""


class AnswerFormat(msgspec.Struct, frozen=True):
    """How a model writes thoughts and tool calls."""

    reasoning: ReasoningParser = "none"
    tools: ToolCallParser = "none"

    @classmethod
    def of(
        cls,
        template_source: str | None,
        reasoning: ReasoningParser | None = None,
        tools: ToolCallParser | None = None,
    ) -> "AnswerFormat":
        """The format of a model with this chat template, as far as none is given explicitly."""
        found = cls() if template_source is None else detect_format(template_source)
        return cls(reasoning or found.reasoning, tools or found.tools)


def detect_format(template_source: str) -> AnswerFormat:
    """Finds the format by the tags in a chat template's source.

    A template that lets the request choose between `<think>` and `</think>` is V3.1's. One that knows the tags
    otherwise, if only to take earlier thoughts out, is R1's.
    """
    reasoning: ReasoningParser = "none"
    if END_THINK in template_source or THINK in template_source:
        chooses = "thinking" in template_source and re.search(r"['\"}]" + END_THINK + r"['\"{]\s*[-}]", template_source)
        reasoning = "deepseek_v31" if chooses and THINK in template_source else "deepseek_r1"
    tools: ToolCallParser = "none"
    if SEPARATOR in template_source:
        tools = "deepseek_v3" if FENCED_CALL.search(template_source) else "deepseek_v31"
    return AnswerFormat(reasoning, tools)


def ends_in_thought(prompt: str) -> bool:
    """Whether the answer to a rendered prompt begins inside a thought, opened by the template or by a text to continue.

    Only what follows the last assistant tag counts: users may write tags too.
    """
    turn = prompt[prompt.rfind(ASSISTANT) + 1 :] if ASSISTANT in prompt else prompt.rstrip()[-len(THINK) :]
    return turn.rfind(THINK) > turn.rfind(END_THINK)


class TagSplitter:
    """Cuts a text that arrives in chunks into tags and what is between them; holds back what may yet become a tag."""

    def __init__(self, tags: Sequence[str]) -> None:
        """Each of `tags` begins with "<", which it has nowhere else."""
        self._tags = tuple(tags)
        self._longest = max(map(len, tags), default=0)
        self._pattern = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        self._held = ""

    def add(self, text: str) -> Iterator[str]:
        """Gives tags, whole and by themselves, and texts, which are never a tag."""
        text, self._held = self._held + text, ""
        if self._pattern is None or "<" not in text:
            if text:
                yield text
            return
        begin = text.rfind("<", max(len(text) - self._longest + 1, 0))
        if begin >= 0 and any(tag != text[begin:] and tag.startswith(text[begin:]) for tag in self._tags):
            text, self._held = text[:begin], text[begin:]
        yield from filter(None, self._pattern.split(text))

    def flush(self) -> str:
        """Returns the text that is still held back, when no more will come."""
        held, self._held = self._held, ""
        return held
