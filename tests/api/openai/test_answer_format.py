"""The format of a model's answers, found in its chat template, and where a prompt leaves the model."""

import pytest

from api.openai.answer_format import AnswerFormat, detect_format, ends_in_thought
from api.settings.chat import ReasoningParser, ToolCallParser

V3_SOURCE = (
    "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json'}}"
)
V31_SOURCE = "{{'<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']}}"
R1_SOURCE = "{% set content = content.split('</think>')[-1] %}"
THINKING_SOURCE = "{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}"


@pytest.mark.parametrize(
    ("source", "reasoning", "tools"),
    [
        (V3_SOURCE, "none", "deepseek_v3"),
        (R1_SOURCE + V3_SOURCE, "deepseek_r1", "deepseek_v3"),
        (R1_SOURCE + V3_SOURCE + r"{{'<｜Assistant｜><think>\n'}}", "deepseek_r1", "deepseek_v3"),
        (R1_SOURCE + V31_SOURCE + THINKING_SOURCE, "deepseek_v31", "deepseek_v31"),
        ("{{ messages[0].content }}", "none", "none"),
    ],
)
def test_the_format_is_found_in_the_template(source: str, reasoning: ReasoningParser, tools: ToolCallParser) -> None:
    assert detect_format(source) == AnswerFormat.of(source) == AnswerFormat(reasoning, tools)
    assert AnswerFormat.of(source, "deepseek_v3", "none") == AnswerFormat("deepseek_v3", "none")
    assert AnswerFormat.of(None) == AnswerFormat()


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<｜User｜>a<｜Assistant｜><think>\n", True),
        ("<｜User｜>a<｜Assistant｜><think>\nWell, I", True),
        ("<｜User｜>a<｜Assistant｜></think>", False),
        ("<｜User｜>a<｜Assistant｜><think>b</think>c", False),
        ("<｜User｜>What is <think>?<｜Assistant｜>", False),
        ("<|user|>What is <think>?\n<|assistant|>", False),
        ("<|user|>a\n<|assistant|><think>\n", True),
    ],
)
def test_the_prompt_tells_whether_the_answer_begins_in_a_thought(prompt: str, is_open: bool) -> None:
    assert ends_in_thought(prompt) is is_open
