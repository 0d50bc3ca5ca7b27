"""Prompts with tools, thoughts and results, against transformers' `apply_chat_template` with the models' own templates.

tests/data/chat_templates/README.md tells where each template came from. That of R1 (February 2025) is V3's with the
thought opened behind the last assistant tag, as it is in R1's; R1-0528's is in vLLM's file. V3.1's is vLLM's with the
arguments as DeepSeek's own writes them, which is not in a registry.
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from api.errors import RequestError
from api.openai.answer import AnswerParser
from api.openai.answer_format import ASSISTANT, END_THINK, AnswerFormat, detect_format, ends_in_thought
from api.text.chat_template import ChatTemplate
from api.text.template_messages import CallForm
from tests.support.small_tokenizer import BOS, EOS, small_tokenizer

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
V3 = (TEMPLATES / "deepseek_v3.jinja").read_text(encoding="utf-8")
R1 = V3.replace("{{'<｜Assistant｜>'}}{% endif %}", r"{{'<｜Assistant｜><think>\n'}}{% endif %}").replace(
    "'<｜Assistant｜>' + message['content'] +", "'<｜Assistant｜>' + message['content'].split('</think>')[-1] +"
)
R1_0528 = (TEMPLATES / "tool_chat_template_deepseekr1.jinja").read_text(encoding="utf-8")
V3_TOOLS = (TEMPLATES / "tool_chat_template_deepseekv3.jinja").read_text(encoding="utf-8")
V31_TOOLS = (TEMPLATES / "tool_chat_template_deepseekv31.jinja").read_text(encoding="utf-8")
V31 = V31_TOOLS.replace("['arguments']|tojson", "['arguments']")

TOKENS = {"bos_token": BOS, "eos_token": EOS}
REFERENCE = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
    tokenizer_object=small_tokenizer(), **TOKENS
)


class Model(NamedTuple):
    """A template, and what it is known to want and to write."""

    source: str
    form: CallForm
    answers: AnswerFormat

    @property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.source, TOKENS)


MODELS = {
    "V3": Model(V3, CallForm(None, False), AnswerFormat("none", "deepseek_v3")),
    "R1": Model(R1, CallForm(None, False), AnswerFormat("deepseek_r1", "deepseek_v3")),
    "R1-0528": Model(R1_0528, CallForm("", True), AnswerFormat("deepseek_r1", "deepseek_v3")),
    "V3 with tools": Model(V3_TOOLS, CallForm(None, True), AnswerFormat("none", "deepseek_v3")),
    "V3.1": Model(V31, CallForm(None, False), AnswerFormat("deepseek_v31", "deepseek_v31")),
    "V3.1 with tools": Model(V31_TOOLS, CallForm(None, True), AnswerFormat("deepseek_v31", "deepseek_v31")),
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True)
OBJECTS = st.dictionaries(
    TEXT, st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT, max_size=2), max_size=3
)
TOOLS = st.builds(
    lambda name, description, fields: {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {field: {"type": "string"} for field in fields}},
        },
    },
    NAMES,
    TEXT,
    st.lists(TEXT, max_size=2),
)


def call(name: str, arguments: dict[str, Any], place: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{place}", "type": "function", "function": function}


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """One question, perhaps calls with their results, and perhaps an answer with a thought."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(TEXT)}]
    if draw(st.booleans()):
        calls = [call(draw(NAMES), draw(OBJECTS), place) for place in range(draw(st.integers(1, 3)))]
        messages.append({"role": "assistant", "content": draw(st.none() | TEXT), "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": made["id"], "content": draw(TEXT)} for made in calls]
    thought = draw(st.sampled_from(["", "<think>\nWell.\n</think>\n\n"]))
    return [*messages, {"role": "assistant", "content": thought + draw(TEXT)}]


CONVERSATIONS = st.builds(
    lambda system, before, question: [*system, *itertools.chain(*before), {"role": "user", "content": question}],
    st.lists(st.builds(lambda text: {"role": "system", "content": text}, TEXT), max_size=2),
    st.lists(turns(), max_size=3),
    TEXT,
)


def reference(model: Model, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers renders, of messages in the form that the template is known to want."""
    formed = [dict(message) for message in messages]
    for message in formed:
        if calls := message.get("tool_calls"):
            message["content"] = message["content"] or model.form.content
            if model.form.takes_objects:
                message["tool_calls"] = [
                    {**made, "function": {**made["function"], "arguments": json.loads(made["function"]["arguments"])}}
                    for made in calls
                ]
    if all(message["content"] is not None for message in formed):
        text: Any = REFERENCE.apply_chat_template(formed, chat_template=model.source, tokenize=False, **options)
        return str(text)
    # Since version 5 it leaves out keys without a value, and V3's own template cannot do without them.
    variables: dict[str, Any] = {**options, **TOKENS}
    rendered: Any = render_jinja_template([formed], chat_template=model.source, **variables)
    return str(rendered[0][0])


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None)
@given(messages=CONVERSATIONS, tools=st.none() | st.lists(TOOLS, max_size=2), thinking=st.booleans())
def test_prompts_are_those_of_transformers(
    name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: bool
) -> None:
    model = MODELS[name]
    prompt = model.template.render(messages, tools=tools, template_kwargs={"thinking": thinking})
    assert prompt == reference(model, messages, tools=tools, add_generation_prompt=True, thinking=thinking)
    assert ends_in_thought(prompt) is (name == "R1" or ("V3.1" in name and thinking))


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None)
@given(messages=CONVERSATIONS, text=TEXT.filter(str.strip), space=st.sampled_from(["", " ", "\n", " \n "]))
def test_final_messages_are_continued_as_in_transformers(
    name: str, messages: list[dict[str, Any]], text: str, space: str
) -> None:
    model = MODELS[name]
    messages = [*messages, {"role": "assistant", "content": text + space}]
    expected = reference(model, messages, continue_final_message=True)
    assert model.template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


TRIMS = "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}{% endfor %}"
SHORTENS = "{% for message in messages %}{{ message.content[:3] }}{% endfor %}"


def test_a_template_that_trims_is_continued_at_the_last_letter() -> None:
    messages = [{"role": "assistant", "content": " A cloud  "}]
    text = ChatTemplate(TRIMS, {}).render(messages, add_generation_prompt=False, continue_final_message=True)
    model = Model(TRIMS, CallForm(), AnswerFormat())
    assert text == "<assistant>A cloud" == reference(model, messages, continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "messages", "prompts", "message"),
    [
        (V3, [{"role": "user", "content": "a"}], True, "goes with add_generation_prompt false only"),
        (V3, [], False, "needs a final message"),
        (V3, [{"role": "assistant", "content": None, "tool_calls": [call("f", {})]}], False, "needs a final message"),
        (SHORTENS, [{"role": "assistant", "content": "a cloud"}], False, "does not show the whole final message"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    template: str, messages: list[dict[str, Any]], prompts: bool, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(template, TOKENS).render(messages, add_generation_prompt=prompts, continue_final_message=True)


@pytest.mark.parametrize("name", MODELS)
def test_formats_of_answers_are_found_in_real_templates(name: str) -> None:
    assert detect_format(MODELS[name].template.source) == MODELS[name].answers


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None)
@given(content=TEXT, calls=st.lists(st.tuples(NAMES, OBJECTS), max_size=3))
def test_an_answer_that_the_template_writes_is_read_as_it_was(
    name: str, content: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    model = MODELS[name]
    if name in {"V3", "R1"}:
        # They end calls behind the second one, and leave out the content beside calls.
        content, calls = ("" if calls else content), calls[:2]
    asked = [{"role": "user", "content": "?"}]
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        answer |= {"tool_calls": [call(*made, place) for place, made in enumerate(calls)]}
    written = model.template.render([*asked, answer], add_generation_prompt=False)
    # vLLM's files have white space between the pieces that DeepSeek's write without any.
    written = written[written.rfind(ASSISTANT) + len(ASSISTANT) :].strip().removeprefix(END_THINK)
    written = written.removesuffix(EOS)
    parser = AnswerParser(model.answers, starts_in_thought=False, has_tools=True)
    deltas = [delta for letter in written for delta in parser.add(letter)] + parser.finish()
    read: list[list[str]] = []
    for part in (part for delta in deltas for part in delta.calls):
        if part.name is not None:
            read.append([part.name, ""])
        read[-1][1] += part.arguments
    assert "".join(delta.content for delta in deltas).strip() == content.strip()
    assert [(name, json.loads(arguments)) for name, arguments in read] == calls


IN_OBJECTS = "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}"
OWN_LOOP = IN_OBJECTS + "<{{ c.function.name }} {{ k }}={{ v }}>{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_come_in_the_form_that_the_template_wants(arguments: Any) -> None:
    made = call("f", {})
    made["function"]["arguments"] = arguments
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [made]}]

    def shown(source: str) -> str:
        return ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=False)

    assert shown(OWN_LOOP) == "<f city=Paris>"
    assert 'f\n```json\n{"city": "Paris"}\n```' in shown(V3)
    assert 'f\n```json\n{"city": "Paris"}\n```' in shown(R1_0528)


def test_arguments_that_a_model_wrote_wrongly_do_not_end_the_conversation() -> None:
    made = call("f", {})
    made["function"]["arguments"] = '{"city": "Par'
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "user", "content": "Go on."},
    ]
    for model in MODELS.values():
        assert "Par" in model.template.render(messages)


def test_text_parts_are_joined_and_thoughts_have_all_names() -> None:
    source = "{% for m in messages %}{{ m.content }}|{{ m.thinking }}|{{ m.reasoning_content }};{% endfor %}"
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        "c",
        {"type": "refusal", "refusal": "d"},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "reasoning": "r"},
    ]
    assert ChatTemplate(source, {}).render(messages) == "a\nb\nc\nd||;|r|r;"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            r"messages\[0\].content\[0\] is of type 'image_url': only",
        ),
        ([{"text": "a"}], r"messages\[0\].content\[0\] must be an object with a type"),
        ([{"type": "text", "text": 1}], r"messages\[0\].content\[0\].text must be a string"),
        (1, r"messages\[0\].content must be a string or a list of text parts"),
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(V3, TOKENS).render([{"role": "user", "content": content}])


def test_with_tools_the_template_for_tools_is_taken() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools {{ tools | length }}"}, {})
    assert template.render([]) == "plain"
    assert template.render([], tools=[]) == "tools 0"
    assert ChatTemplate("{{ tools is none }}", {}).render([]) == "True"


def test_requests_bring_their_own_template_and_variables(tmp_path: Path) -> None:
    own = ChatTemplate(V3, TOKENS).replaced("{{ bos_token }}{{ name }}{{ documents is none }}")
    assert own.render([], template_kwargs={"name": "x"}) == f"{BOS}xTrue"
    with pytest.raises(RequestError, match="chat_template is not a Jinja template"):
        own.replaced("{% if %}")
    with pytest.raises(RequestError, match="chat_template has 100000 characters: at most 32768"):
        own.replaced("x" * 100_000)
    with pytest.raises(RequestError, match="chat_template_kwargs cannot change tools"):
        own.render([], template_kwargs={"tools": []})
