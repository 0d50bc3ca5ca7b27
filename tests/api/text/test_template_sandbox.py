"""Templates of strangers: what transformers allows is rendered alike, and what could hold up a server is refused."""

import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from api.errors import RequestError
from api.text.chat_template import ChatTemplate
from api.text.template_budget import RENDER_SECONDS

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be kind.\nBe brief. "},
    {"role": "user", "content": "What is <fog> & 雾?"},
    {"role": "assistant", "content": "a, b, c"},
]

HARMLESS = [
    "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{% if not loop.first %}{{ loop.previtem.role }}{% endif %}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ m['role'] | upper }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | length }} {{ (messages | first).role }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
    "{{ messages | rejectattr('role', 'in', ['user', 'system']) | list | tojson }}",
    "{{ messages[1] | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=True, separators=(',', ':')) }}",
    "{{ messages[2].content.split(', ') | sort(reverse=true) | join('') }}{{ messages[2]['content'][::-1] }}",
    "{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ undefined_name }}{{ 'ab' * 3 }}{{ 7 // 2 ** 2 % 3 }}{{ [1] + [2] }}",
    "{{ '%s: %05d' % ('x', 42) }}{{ '{}-{a:>4}'.format(1, a=2) }}{{ '%s' | format('y') }}",
    "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text + m.role[0] %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text }}{{ ns.n }}",
    "{% macro say(m, end='!') %}{{ m.content.replace('Be', 'Is') }}{{ end }}{% endmacro %}{{ say(messages[0]) }}",
    "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}in{% endcall %}{% filter upper %}up{% endfilter %}",
    "{% set block %}a{{ 1 }}{% endset %}{{ block | indent(2) }}{{ block is string }}{{ messages is sequence }}",
    "{{ messages[0].items() | list | length }}{{ messages[0].keys() | join }}{{ messages[0] | dictsort | first }}",
    "{{ dict(a=1) | items | list }}{{ range(3) | list }}{{ range(5) | sum }}{{ [3, 1] | min }}{{ (1, 2) | last }}",
    "{% generation %}{{ messages[1].content | safe }}{% endgeneration %}{{ '<a>' | escape }}{{ 'x y' | title }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner('|') %}{{ j() }}{{ j() }}",
    "{{ messages[0].content.strip().startswith('Be') and 'kind' in messages[0].content and 1 < 2 <= 3 }}",
    "{{ missing is defined }}{{ missing | default('d') }}{{ messages[0].missing is none }}{{ [1, 1] | unique | list }}",
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{{ messages[1:] | length }}\n\n",
    "{{ messages }}{{ messages[0].content.find('kind') }}{{ 1.5 | round | int }}{{ -3 | abs }}{{ true }}{{ 'a' 'b' }}",
]


@pytest.mark.parametrize("source", HARMLESS)
def test_harmless_templates_are_rendered_as_in_transformers(source: str) -> None:
    rendered: Any = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source, {}).render(MESSAGES) == rendered[0][0]


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(99) %}{% set ns.x = DOUBLE %}{% endfor %}"
BIG = "{% set s = 'x' * 1000000 %}{% set l = [s] * 100000 %}"

HOSTILE = [
    LOOPS,
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [[1, 2]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * 'a' }}",
    "{{ [0] * 1000000000 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    DOUBLED.replace("DOUBLE", "ns.x + ns.x"),
    DOUBLED.replace("DOUBLE", "ns.x ~ ns.x"),
    DOUBLED.replace("DOUBLE", "[ns.x, ns.x]") + "{{ ns.x }}",
    DOUBLED.replace("DOUBLE", "[ns.x, ns.x]") + "{{ ns.x == ns.x }}",
    DOUBLED.replace("DOUBLE", "ns.x.replace('a', 'aa')"),
    DOUBLED.replace("DOUBLE", "ns.x | replace('a', 'aa')"),
    DOUBLED.replace("DOUBLE", "ns.x.join(['a', 'b', 'c'])"),
    DOUBLED.replace("DOUBLE", "['a', 'b', 'c'] | join(ns.x)"),
    DOUBLED.replace("DOUBLE", "'{0}{0}'.format(ns.x)"),
    DOUBLED.replace("DOUBLE", "'%s%s' % (ns.x, ns.x)"),
    DOUBLED.replace("DOUBLE", "'%s%s' | format(ns.x, ns.x)"),
    DOUBLED.replace("{% set ns.x = DOUBLE %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ [1] | batch(1000000000, 0) | list }}",
    "{{ lipsum(n=1000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    BIG + "{{ l | sort }}",
    BIG + "{{ l | tojson }}",
    BIG + "{{ l | string }}",
    BIG + "{{ l }}",
    BIG + "{{ l | join }}",
    BIG + "{{ l | map('upper') | list }}",
    BIG + "{{ l ~ '' }}",
    BIG + "{% set t = 'x' * 1000000 %}{{ l == [t] * 100000 }}",
    BIG + "{{ l is eq l }}{{ l in [l] }}",
    BIG + "{{ 'y' in l }}{% for i in range(99999) %}{{ s.count('y') }}{% endfor %}",
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{% set l = range(99999) | list %}" + "{{ l | sort | list | length }}" * 900,
    "x" * 30_000 + "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "{{ " + "-" * 10_000 + "1 }}",
    "{{ a" + ".b" * 10_000 + " }}",
    "{{ 1" + " + 1" * 7_000 + " }}",
    "{% if 1 %}" * 1500 + "{% endif %}" * 1500,
    "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
    "{% include 'a' %}",
    "{% extends 'a' %}",
    "{{ messages.append(1) }}{{ messages[0].pop('role') }}",
    "{{ ''.__class__.__mro__ }}{{ namespace.__init__.__globals__ }}",
    "{{ messages | map(attribute='__class__') | list }}{{ messages | attr('__class__') | list }}{{ x.y.z }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.encode() }}",
]


HIDDEN = [
    "{{ messages.__class__ }}{{ raise_exception.__globals__ }}{{ range.__self__ }}{{ namespace.mro }}",
    "{{ '{0.__class__}'.format(1) }}{{ (messages | map('upper')).gi_frame }}{{ self._TemplateReference__context }}",
    "{{ messages[0].content.encode }}{{ (1).to_bytes }}",
]


@pytest.mark.parametrize("source", HIDDEN)
def test_what_is_not_for_templates_shows_nothing(source: str) -> None:
    assert ChatTemplate("", {}).replaced(source).render(MESSAGES) == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("source", HOSTILE, ids=[f"{place}" for place in range(len(HOSTILE))])
def test_hostile_templates_are_refused_in_bounded_time_and_memory(source: str) -> None:
    own = ChatTemplate("", {})
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(RequestError) as error:
            own.replaced(source).render(MESSAGES)
        seconds = time.thread_time() - began
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 400
    assert most < 600e6
    assert seconds < 4 * RENDER_SECONDS


def test_a_template_that_is_not_trusted_spends_no_more_on_calls() -> None:
    began = time.thread_time()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(RequestError, match="takes too long"):
        ChatTemplate(LOOPS, {}).render([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert time.thread_time() - began < 4 * RENDER_SECONDS


def test_prompts_have_a_longest_length() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, characters_max=1000)
    assert len(template.render([{"role": "user", "content": "x" * 1000}])) == 1000
    with pytest.raises(RequestError, match="the text would be too long"):
        template.render([{"role": "user", "content": "x" * 1001}])


def test_long_conversations_are_rendered_fast() -> None:
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<u>' + m['content'] }}{% else %}{{ m.content | trim }}"
    )
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y"}] * 2000
    began = time.thread_time()
    assert len(ChatTemplate(source + "{% endif %}{% endfor %}", {}).render(messages)) == 2_008_000
    assert time.thread_time() - began < RENDER_SECONDS / 2
