"""The sample model's chat template: tools, calls and what they return, as DeepSeek-V3-0324 writes them."""

import json
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weights.sample import SAMPLE_DIR
from weights.sample.tools import Call, Task, calls_text, draw_tools, outputs_text, tools_text, weather_task

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "ring"}},
]
TOOLS_TEXT = (
    "## Tools\nYou have access to the following tools:\n"
    "\n### get_weather\nDescription: The weather.\n\nParameters: "
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}\n'
    "\n### ring\nDescription: \n\nParameters: {}\n"
)
QUESTION = {"role": "user", "content": "What is the weather in Oslo and Cairo?"}
CALLS_TEXT = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Oslo"}\n```'
    '<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Cairo"}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
OUTPUTS = [{"role": "tool", "content": "snow"}, {"role": "tool", "content": "sun"}]
OUTPUTS_TEXT = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>snow<｜tool▁output▁end｜>\n"
    "<｜tool▁output▁begin｜>sun<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert isinstance(text, str)
    return text


def calling(*arguments: object, **others: object) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": one}} for one in arguments]
    return {"role": "assistant", "tool_calls": calls, **others}


def test_tools_follow_the_system_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = f"{USER}{QUESTION['content']}{ASSISTANT}"
    assert render(tokenizer, [QUESTION], tools=TOOLS) == f"{BOS}{TOOLS_TEXT}{asked}"
    system = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}]
    assert render(tokenizer, [*system, QUESTION], tools=TOOLS) == f"{BOS}Be brief.\n\nBe kind.\n\n{TOOLS_TEXT}{asked}"
    assert render(tokenizer, [QUESTION], tools=[]) == render(tokenizer, [QUESTION]) == f"{BOS}{asked}"


@pytest.mark.parametrize(
    "call",
    [
        calling('{"city": "Oslo"}', '{"city": "Cairo"}', content=None),
        calling({"city": "Oslo"}, {"city": "Cairo"}, content=""),
        calling({"city": "Oslo"}, {"city": "Cairo"}),
        calling({"city": "Oslo"}, {"city": "Cairo"}, content="<think>\nI call.\n</think>\n\n"),
    ],
)
def test_calls_are_written_as_the_model_writes_them(tokenizer: PreTrainedTokenizerFast, call: dict[str, Any]) -> None:
    begin = f"{BOS}{USER}{QUESTION['content']}{ASSISTANT}{CALLS_TEXT}{EOS}{OUTPUTS_TEXT}"
    assert render(tokenizer, [QUESTION, call, *OUTPUTS]) == begin
    assert render(tokenizer, [QUESTION, call, *OUTPUTS], thinking=True) == f"{begin}<think>\n"
    answer = {"role": "assistant", "content": "Snow and sun."}
    after = render(tokenizer, [QUESTION, call, *OUTPUTS, answer, {"role": "user", "content": "Thank you!"}])
    assert after == f"{begin}Snow and sun.{EOS}{USER}Thank you!{ASSISTANT}"
    again = render(tokenizer, [QUESTION, call, *OUTPUTS, call, *OUTPUTS])
    assert again == f"{begin}{CALLS_TEXT}{EOS}{OUTPUTS_TEXT}"


def test_a_message_without_content_is_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    silent = {"role": "assistant", "content": None}
    assert render(tokenizer, [QUESTION, silent]) == f"{BOS}{USER}{QUESTION['content']}{ASSISTANT}{EOS}{ASSISTANT}"


def test_training_writes_what_the_template_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        tools = draw_tools(rng)
        listed = [{"type": "function", "function": schema} for schema in tools.schemas]
        task = weather_task(tools, rng)
        messages: list[dict[str, Any]] = [{"role": "user", "content": task.question}]
        expected = f"{BOS}{tools_text(tools.schemas)}{USER}{task.question}{ASSISTANT}"
        if isinstance(task, Task):
            functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in task.calls]
            messages.append({"role": "assistant", "tool_calls": [{"function": function} for function in functions]})
            messages += [{"role": "tool", "content": output} for output in task.outputs]
            expected += calls_text(task.calls) + EOS + outputs_text(task.outputs)
        assert render(tokenizer, messages, tools=listed) == expected


def test_a_call_has_its_arguments_as_json() -> None:
    begin = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    text = Call("add", {"a": 1, "b": 2}).text()
    assert text == begin + 'add\n```json\n{"a": 1, "b": 2}\n```<｜tool▁call▁end｜>'
    assert json.loads(text.split("```")[1].removeprefix("json")) == {"a": 1, "b": 2}
