"""Chat templates, against transformers' `apply_chat_template`; and the demo that puts its prompts into them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from api.demo.jobs import Batch
from api.demo.options import DemoOptions
from api.demo.setup import DemoSetup
from api.errors import OptionError, RequestError
from api.settings.engine import EngineSettings
from api.text.chat_template import ChatTemplate
from api.text.tokenizer import TextTokenizer
from tests.support.small_tokenizer import BOS, EOS, write_tokenizer
from weights.errors import CheckpointError
from weights.sample import SAMPLE_DIR

CONVERSATIONS = [
    [{"role": "user", "content": "What is fog?"}],
    [
        {"role": "system", "content": 'Be <brief> & "kind".\n'},
        {"role": "user", "content": "Was ist Nebel? 雾"},
        {"role": "assistant", "content": "<think>\nA cloud?\n</think>\n\nA cloud."},
        {"role": "user", "content": "Thank you!"},
    ],
]
BLOCKS = """
{%- if not add_generation_prompt is defined %}
  {% set add_generation_prompt = false %}
{% endif %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
<{{ message.role }}>{{ message | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}
"""
"""A template with what transformers adds to Jinja: trimmed blocks, loop controls, a filter that keeps characters."""


def rendered_alike(directory: Path, messages: list[dict[str, str]]) -> bool:
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return ChatTemplate.of(TextTokenizer.load(directory)).render(messages) == str(expected)


def with_template(directory: Path, template: object) -> TextTokenizer:
    config = {"bos_token": {"content": BOS, "__type": "AddedToken"}, "eos_token": EOS, "chat_template": template}
    write_tokenizer(directory, tokenizer_class="PreTrainedTokenizerFast", **config)
    return TextTokenizer.load(directory)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_templates_are_rendered_as_transformers_does(messages: list[dict[str, str]], tmp_path: Path) -> None:
    assert rendered_alike(SAMPLE_DIR, messages)
    with_template(tmp_path, BLOCKS)
    assert rendered_alike(tmp_path, messages)


def test_of_several_templates_it_is_the_default_and_a_file_goes_before_all(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain{{ eos_token }}"}]
    assert ChatTemplate.of(with_template(tmp_path, named)).render([]) == f"plain{EOS}"
    (tmp_path / "chat_template.jinja").write_text("from a file", encoding="utf-8")
    assert ChatTemplate.of(TextTokenizer.load(tmp_path)).render([]) == "from a file"


@pytest.mark.parametrize("template", [None, [{"name": "tool_use", "template": "tools"}], "{% if %}"])
def test_a_tokenizer_without_a_usable_template_is_refused(template: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate.of(with_template(tmp_path, template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_cannot_or_must_not_do_is_the_requests_error(template: str, tmp_path: Path) -> None:
    chat = ChatTemplate.of(with_template(tmp_path, template))
    with pytest.raises(RequestError, match="cannot take these messages"):
        chat.render(CONVERSATIONS[0])


def prompt_tokens(tmp_path: Path, **options: Any) -> list[list[int]]:
    setup = DemoSetup.of(DemoOptions(**options), EngineSettings.of(cache_dir=tmp_path), str(SAMPLE_DIR), {})
    return [want.tokens for want in Batch.of(setup, None).left]


def test_the_demo_puts_prompts_into_the_template_if_asked(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE_DIR)
    prompts = ["Write a haiku about hardware", "What is fog?"]
    expected = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]
    assert prompt_tokens(tmp_path, prompts=prompts, chat_template=True) == expected
    assert prompt_tokens(tmp_path, prompts=prompts) == [tokenizer.encode(prompt) for prompt in prompts]


def test_results_of_templates_and_of_plain_prompts_are_not_confused(tmp_path: Path) -> None:
    def settings(**options: Any) -> str:
        options = {"prompts": ["a"], **options}
        return DemoSetup.of(DemoOptions(**options), EngineSettings.of(cache_dir=tmp_path), None, {}).results_settings

    assert settings(chat_template=True) != settings()
    assert settings(random_weights=True, single_layer="moe") != settings(random_weights=True)
    assert json.loads(settings())["chat_template"] is False


def test_references_are_no_chats() -> None:
    with pytest.raises(OptionError, match="--chat-template goes with prompts"):
        DemoOptions(token_accuracy=True, reference_files=[Path("r")], chat_template=True)
