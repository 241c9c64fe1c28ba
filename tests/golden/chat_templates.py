"""Conversations as transformers renders them, and what Jinja makes of small templates.

    python tests/golden/chat_templates.py FOLDER... > tests/golden/chat_templates.json

Each FOLDER holds `*.jinja` files, or is a model folder with a tokenizer_config.json. The templates go into the
output beside what they give: only those whose licence allows it belong into the repository (its README names
them). transformers 5, no network.
"""

import datetime as real
import json
import pathlib
import sys

from transformers.utils import chat_template_utils as utils

NOW = real.datetime(2026, 3, 7, 9, 5, 3, 120)


class Clock(real.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


utils.datetime = Clock
SPECIAL = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]


def said(role, content=None, **more):
    return {"role": role, "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, in °C <or> °F & more",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its \"name\"\n"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": [1, 2.5, None, True]},
                "scale": {"enum": ["c", "f"], "values": {}},
            },
            "required": ["city"],
        },
    },
}
CALL = {"id": "c1a2b3c4d", "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Łódź", "days": [1, 2], "exact": 1e-7, "far": 1e22}}}
PLAIN_CALL = {"name": "weather", "arguments": {"city": "Rome"}}

CONVERSATIONS = {
    "one": [said("user", "Hi there.")],
    "answered": [said("user", "Hi there."), said("assistant", "Hello!")],
    "system": [said("system", "Be brief."), said("user", "Hi")],
    "turns": [said("system", "Be brief."), said("user", "One?"), said("assistant", "1"), said("user", "Two?"),
              said("assistant", "2"), said("user", "Three?")],
    "no system": [said("user", "One?"), said("assistant", "1"), said("user", "Two?"), said("assistant", "2")],
    "empty turns": [said("system", ""), said("user", ""), said("assistant", ""), said("user", "")],
    "spaces": [said("system", "  Be brief.\n"), said("user", "\n\n Hi \t"), said("assistant", "  Hello \n")],
    "unicode": [said("user", "Zażółć 🦙 \u00a0x\u2028 漢字 <|im_end|> {{ 1 }} {% if %}"),
                said("assistant", "e\u0301 \x1c \u3000")],
    "two users": [said("user", "a"), said("user", "b")],
    "answer first": [said("assistant", "a"), said("user", "b")],
    "late system": [said("user", "a"), said("assistant", "b"), said("system", "c"), said("user", "d")],
    "odd role": [said("user", "a"), said("critic", "b")],
    "thinking": [said("user", "2+2?"), said("assistant", "<think>\nTwo and two.\n</think>\n\n4"),
                 said("user", "3+3?"), said("assistant", "6", reasoning_content="Three and three.\n")],
    "thought": [said("user", "2+2?"), said("assistant", "4", thinking="hm")],
    "called": [said("user", "Rain?"), said("assistant", None, tool_calls=[CALL]),
               said("tool", "{\"rain\": true}", tool_call_id="c1a2b3c4d", name="weather"), said("assistant", "Yes.")],
    "called twice": [said("system", "Help."), said("user", "Rain?"),
                     said("assistant", "I look.", tool_calls=[CALL, PLAIN_CALL]),
                     said("tool", "yes"), said("tool", "no"), said("assistant", "Both."), said("user", "And?")],
    "a call without text": [said("user", "Rain?"), said("assistant", "", tool_calls=[CALL])],
}
TOOLS = {"called": [WEATHER], "called twice": [WEATHER, {"name": "f", "n": None}], "one": None}
WITH_TOOLS = {"one with tools": ("one", [WEATHER]), "system with tools": ("system", [WEATHER])}
KWARGS = {"turns": {"enable_thinking": False}}

CONTEXT = {
    "messages": [said("user", " a b\tc\n"), said("assistant", "d"), said("user", "e", name="n")],
    "tools": [WEATHER],
    "n": None, "t": True, "i": 7, "x": 2.5, "big": 1e16, "small": 1.5e-5, "whole": 3.0, "s": "it's \"so\"\n é",
    "list": [1, "a", None, True, 2.0, "it's"], "empty": [], "map": {"a": 1, "items": [2], "get": 3, "z": "q", "values": 4},
    "nested": {"k": {"l": [{"m": 1}, {"m": 2}]}}, "text": "<think>a</think>\n\nb",
}
SMALL = """
{{ n }}|{{ t }}|{{ i }}|{{ x }}|{{ big }}|{{ small }}|{{ whole }}|{{ s }}
{{ list }}|{{ empty }}|{{ map }}|{{ nested }}
{{ (1, 'a') }}|{{ (1,) }}
{{ s ~ 1 ~ n ~ t ~ x }}
{{ 'a' + 'b' }}
{{ 'a' + 1 }}
{{ 'a' + n }}
{{ n + 1 }}
{{ missing }}|{{ missing is defined }}|{{ missing is none }}|{{ n is none }}|{{ not missing }}
{{ missing.x }}
{{ missing + 'a' }}
{{ map.missing }}
{{ map.missing.more }}
{{ messages[0].missing is defined }}
{{ messages[9] }}
{{ messages[9].role }}
{{ messages[-1].content }}
{{ messages[1:] | length }}|{{ messages[::-1][0].name }}|{{ messages[:-1][-1]['content'] }}|{{ text[2:5] }}|{{ text[-1] }}
{{ messages[0].content.strip() }}|{{ messages[0].content | trim }}|{{ text.split('</think>')[-1].lstrip('\\n') }}
{{ text.split('</think>')[0].split('<think>')[-1] }}|{{ 'a,b,,c'.split(',') }}|{{ ' a  b '.split() }}|{{ 'a b c'.split(' ', 1) }}
{{ ' a  b c '.split(none, 1) }}|{{ 'a b c'.rsplit(' ', 1) }}|{{ ' a b  c '.rsplit(none, 1) }}|{{ 'abc'.partition('b') }}|{{ 'abc'.rpartition('x') }}
{{ 'a'.split('') }}
{{ 'a\\r\\nb\\x0bc\\n'.splitlines() }}|{{ 'a\\nb'.splitlines(true) }}
{{ 'abc'.startswith('a') }}|{{ 'abc'.endswith(('x', 'c')) }}|{{ 'abc'.replace('b', 'x') }}|{{ 'AbC'.lower() }}|{{ 'abc'.upper() }}|{{ 'abc'.title() }}
{{ 'abc'.removeprefix('a') }}|{{ 'abc'.removesuffix('bc') }}|{{ 'abc'.find('c') }}|{{ 'abcb'.rfind('b') }}|{{ 'abc'.index('c') }}|{{ 'abca'.count('a') }}
{{ 'abc'.index('x') }}
{{ 'x'.join(['a', 'b']) }}|{{ ['a', 'b'] | join(', ') }}|{{ [1, n, t] | join('-') }}
{{ '%s and %d' | format('a', 3) }}|{{ '{} {}'.format('a', 1) }}
{{ map.items() | list }}|{{ map.keys() | list }}|{{ map.get('a') }}|{{ map.get('no', 5) }}|{{ map.get('no') }}
{% for k, v in map.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in map | dictsort %}{{ k }};{% endfor %}
{% for k in map %}{{ k }};{% endfor %}
{{ map['items'] }}|{{ nested.k.l[1].m }}|{{ nested['k']['l'] | map(attribute='m') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first }}
{{ messages | map(attribute='role') | unique | list }}|{{ list | select('string') | list }}|{{ [3, 1, 2] | sort }}|{{ [3, 1, 2] | max }}
{{ tools | tojson }}
{{ tools | tojson(indent=2) }}
{{ map | tojson(indent=4) }}|{{ empty | tojson(indent=4) }}|{{ {} | tojson(indent=2) }}|{{ [[]] | tojson(indent=1) }}
{{ map | tojson(separators=(',', ':')) }}|{{ map | tojson(sort_keys=true) }}|{{ s | tojson(ensure_ascii=true) }}|{{ '🦙' | tojson(true) }}
{{ s | tojson }}|{{ list | tojson }}|{{ big | tojson }}|{{ small | tojson }}|{{ whole | tojson }}|{{ n | tojson }}|{{ '\\x01\\x7f</a>&' | tojson }}
{{ {1: 2, none: 3, true: 4} | tojson }}
{{ missing | tojson }}
{{ (1, 'a') | tojson }}
{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}
{% set a = 1 %}{% for m in messages %}{% set a = a + 1 %}{% endfor %}{{ a }}
{% set ns = namespace() %}{{ ns.a is defined }}{% set ns.a = [] %}{% set ns.a = ns.a + [1] %}{{ ns.a }}
{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}
{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ loop.nextitem.role if not loop.last else '-' }};{% endfor %}{% for m in [] %}x{% else %}none{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{% endfor %}
{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }};{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(5, 0, -2) %}{{ i }}{% endfor %}
{% macro f(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}
{% macro f() %}{{ caller() }}!{% endmacro %}{% call f() %}in{% endcall %}
{% set b %}<{{ i }}>{% endset %}{{ b }}{{ b | length }}
{{ i / 2 }}|{{ i // 2 }}|{{ i % 4 }}|{{ i ** 2 }}|{{ -i // 2 }}|{{ 1 / 2 }}|{{ 6 / 2 }}|{{ 7.0 // 2 }}|{{ 2 * 'ab' }}|{{ [1] * 2 }}
{{ 'a' in 'abc' }}|{{ 'a' in map }}|{{ 1 in list }}|{{ 'q' not in list }}|{{ i > 3 and x < 3 or n }}|{{ n or 'd' }}|{{ '' or empty }}
{{ 'a' in missing }}
{{ 'a' in n }}
{{ missing | length }}|{{ missing | default('d') }}|{{ n | default('d') }}|{{ '' | default('d', true) }}|{{ n | string }}|{{ missing | trim }}|{{ n | trim }}
{{ 'a' if t }}|{{ 'a' if not t }}|{{ 'a' if not t else 'b' }}
{{ s is string }}|{{ list is string }}|{{ s is iterable }}|{{ list is iterable }}|{{ i is iterable }}|{{ s is sequence }}|{{ map is sequence }}|{{ n is sequence }}|{{ missing is iterable }}
{{ map is mapping }}|{{ list is mapping }}|{{ i is number }}|{{ t is boolean }}|{{ t is number }}|{{ i is integer }}|{{ x is float }}|{{ t is true }}|{{ n is false }}|{{ i is odd }}|{{ i is divisibleby 7 }}
{{ i == 7.0 }}|{{ t == 1 }}|{{ n == false }}|{{ [1] == [1] }}|{{ 'a' < 'b' }}|{{ (1, 2) == (1, 2) }}
{{ 'abc' | first }}|{{ list | last }}|{{ 'abc' | reverse }}|{{ list | reverse | list }}|{{ 'aXb' | capitalize }}|{{ 'a b' | title }}|{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}
{{ '3' | int + 1 }}|{{ 'x' | int }}|{{ '2.5' | float }}|{{ 2.567 | round(1) }}|{{ 3 | round }}|{{ -3 | abs }}|{{ [1, 2] | sum }}
{{ 'x' | replace('x', 'y') }}|{{ 'a  b' | wordcount }}|{{ 'abc' | list }}|{{ [1, 2, 3] | batch(2) | list }}|{{ 'aa' | length }}|{{ list | count }}
{{ dict(a=1, b='c') }}|{{ dict(a=1).a }}
{{ raise_exception('No  way: ' + s) }}
{% if t %}{{ raise_exception(i) }}{% endif %}
{{ nothing() }}
{{ s.nothing() }}
{{ list.append(1) }}
{{ s | nothing }}
{{ s is nothing }}
{% include 'x' %}
{% import 'x' as y %}{{ y.f() }}
{% extends 'x' %}
{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d %H:%M:%S') }}|{{ strftime_now('%B %-d, %Y %A %j %I %p %y %%') }}|{{ strftime_now('%f') }}
{{ s | upper | e }}|{{ '<a>' | escape }}|{{ '<a>' | safe }}
{{ '\\u00e9\\x41\\t\\q\\'\\"' }}|{{ "it's" }}
{# a comment #}x{#- another -#} y
{% raw %}{{ a }}{% generation %}{% endraw %}
{% generation %}{{ i }}{% endgeneration %}
a {%- generation -%} b {%- endgeneration %} c
{% set q = 1 %}{% generation %}{% set q = 2 %}{{ q }}{% endgeneration %}{{ q }}
{{ text | replace('<think>', '') | trim }}
{%- for m in messages -%} {{- m.role -}} {%- endfor -%}
{{ messages[0]['content'] if messages[0]['role'] == 'user' and messages[0]['content'] is string else 'no' }}
{{ [messages[0]] + messages[1:] == messages }}|{{ ([1] + [2]) | length }}|{{ {'a': 1}.a }}
{{ [1] + ['a'] }}|{{ ([1] + [2]) | tojson }}|{{ ([1] + [2]) is sequence }}|{{ ([1] + [2]).index(2) }}|{{ n is iterable }}
{{ 10 | string ~ 'x' }}|{{ 'a' ~ 'b' | upper }}|{{ not t and n }}|{{ 1 if n is not none else 2 }}
{{ s[0] | upper + s[1:] }}
{{ 'a' * 3 }}|{{ '-' * 0 }}|{{ x | int }}|{{ 1_000 }}|{{ 1e3 }}|{{ 0.1 + 0.2 }}|{{ 1.0 }}|{{ -0.0 }}|{{ 1e400 }}
{{ 'ß'.upper() }}|{{ 'İ'.lower() }}|{{ 'a-b c'.title() }}|{{ '\\x1ca\\x1f'.strip() }}|{{ '\\x1ca' | trim }}|{{ 'xay'.strip('xy') }}
{{ ['b', 'A', 'c'] | sort }}|{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | list }}|{{ messages | groupby('role') | length }}
""".strip().split("\n")
BLOCKS = [
    "  {% if t %}\n    a\n  {% endif %}\n\n b\n",
    "  {%+ if t %}\n    a\n  {%- endif +%}\n\n b\n\n",
    "{% for m in messages %}\n  {{ m.role }}\n{% endfor %}\n",
    "  {# c #}\n  x {# d #}\n  {#- e #}\ny",
    "a\r\n  {% if t %}\r\n b \r{% endif %}\rc",
    "{% generation %}\n x\n{% endgeneration %}\n y",
    "a\n  {% generation %} x {% endgeneration %}  \n y",
    "a\n  {%- generation %}\n x {%- endgeneration -%}  \n y",
    "{{ i }}\n{{- i }}\n {{ i -}} \n x\n\n",
    "{% set x %}\n a\n{% endset %}\n[{{ x }}]",
    "{% raw %}\n {{ x }}\n{% endraw %}\n y",
    "\n\n",
    "",
    "{% macro f(x) %}\n  <{{ x }}>\n{% endmacro %}\n{{ f(1) }}\n{{ f(2) -}}\n",
]


def attempt(source, context):
    try:
        return utils._compile_jinja_template(source).render(**context)
    except Exception:  # noqa: BLE001 - whatever it is, fewbit has to refuse too
        return None


def rendered(source, special, name, prompt):
    conversation, tools = WITH_TOOLS.get(name, (name, TOOLS.get(name)))
    try:
        chat = utils._normalize_chat_messages(CONVERSATIONS[conversation])
        texts, _ = utils.render_jinja_template(
            conversations=[chat], tools=tools, chat_template=source, add_generation_prompt=prompt,
            **{**special, **KWARGS.get(name, {})})
        return texts[0]
    except Exception:  # noqa: BLE001
        return None


def templates(folders):
    for folder in map(pathlib.Path, folders):
        for path in sorted(folder.glob("*.jinja")):
            yield path.stem, path.read_text(), {"bos_token": "<s>", "eos_token": "</s>"}
        config = folder / "tokenizer_config.json"
        if config.exists():
            config = json.loads(config.read_text())
            token = lambda t: t.get("content") if isinstance(t, dict) else t  # noqa: E731
            special = {key: token(config[key]) for key in SPECIAL if config.get(key)}
            if config.get("chat_template"):
                yield folder.name, config["chat_template"], special


def main():
    out = {"now": NOW.isoformat(), "context": CONTEXT,
           "conversations": {name: {"messages": messages, "tools": TOOLS.get(name), "kwargs": KWARGS.get(name, {})}
                             for name, messages in CONVERSATIONS.items()}}
    for name, (base, tools) in WITH_TOOLS.items():
        out["conversations"][name] = {"messages": CONVERSATIONS[base], "tools": tools, "kwargs": {}}
    out["small"] = [[source, attempt(source, CONTEXT)] for source in SMALL + BLOCKS]
    out["templates"] = {}
    for name, source, special in templates(sys.argv[1:]):
        results = {}
        for chat in out["conversations"]:
            plain, asked = (rendered(source, special, chat, prompt) for prompt in (False, True))
            # The prompt is mostly a text behind the rest.
            ends = plain is not None and asked is not None and asked.startswith(plain)
            results[chat] = [plain, "…" + asked[len(plain):] if ends else asked]
        out["templates"][name] = {"source": source, "special": special, "results": results}
    json.dump(out, sys.stdout, ensure_ascii=False, indent=0)
    print()


main()
