"""Whole folders, loaded and asked: which file a template stands in, and what ends an answer."""

import json
import shutil
import sys
from typing import ClassVar

import peak
import pytest
import tiny
import torch
from comfyui_scene import make_endless_model
from jinja2.exceptions import TemplateError
from pictures import draw

from qwenvl.errors import UnusableError
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.loading.template import turn_ends, written
from qwenvl.prompting.prompt import encode
from qwenvl.request import LoadSpec, Request, Sampling

CPU = Machine("cpu", torch.float32, "")
ANSWER = "a red circle on a blue background"
# Of the demo model.
END_OF_TEXT, END_OF_TURN = 998, 1000


def ignore(*_):
    pass


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "m")


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def answer(folder):
    """What the demo model says of a red circle, all of its tokens."""
    handle = load(LoadSpec("m"), folder, CPU)
    request = Request(handle.spec, "Describe this image.", sampling=Sampling(do_sample=False, max_new_tokens=40))
    prompt = encode(handle, request, [draw("circle", "red", "blue")])
    result = tiny.decoder(handle.model).generate(prompt.inputs, request.sampling, None, ignore, ignore)
    return handle.tokenizer.decode(result.ids)


def _in_tokenizer_config(folder, template):
    change(folder / "tokenizer_config.json", chat_template=template)


def _with_others(folder, template):
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "{{ nothing.at.all }}"}]
    change(folder / "tokenizer_config.json", chat_template=named)


def _by_one_name(folder, template):
    change(folder / "tokenizer_config.json", chat_template=[{"name": "vision", "template": template}])


def _in_the_older_file(folder, template):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def _beside_others(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ nothing.at.all }}")


PLACES = [_in_tokenizer_config, _with_others, _by_one_name, _in_the_older_file, _beside_others]


@pytest.mark.parametrize("put", PLACES)
def test_a_chat_template_counts_in_whichever_file_it_stands(folder, put):
    file = folder / "chat_template.jinja"
    template = file.read_text()
    file.unlink()
    put(folder, template)
    assert answer(folder) == ANSWER


def test_a_text_model_may_have_its_template_in_the_older_file(tmp_path):
    folder = tiny.save("qwen3", tmp_path / "m")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    handle = load(LoadSpec("m"), folder, CPU)
    assert handle.tokenizer.chat_template == template


def test_the_processor_s_own_template_comes_first(folder):
    _in_tokenizer_config(folder, "{{ 'another' }}")
    assert answer(folder) == ANSWER


def test_without_any_template_a_question_is_an_error_that_says_so(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UnusableError, match=r"chat template of m cannot be used.*does not have a chat template"):
        answer(folder)


def _no_settings(folder):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = END_OF_TEXT
    (folder / "config.json").write_text(json.dumps(config))


def _end_of_text_only(folder):
    change(folder / "generation_config.json", eos_token_id=END_OF_TEXT)


def _none(folder):
    change(folder / "generation_config.json", eos_token_id=None)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>", None])
@pytest.mark.parametrize("settings", [_no_settings, _end_of_text_only, _none])
def test_a_turn_ends_where_the_tokenizer_or_the_template_says_so(folder, settings, eos):
    """With an eos of <|endoftext|> in the tokenizer too, the template alone knows what ends a turn."""
    settings(folder)
    change(folder / "tokenizer_config.json", eos_token=eos)
    assert answer(folder) == ANSWER


def test_the_tokenizer_s_eos_counts_where_the_template_shows_no_end(folder):
    _no_settings(folder)
    template = (folder / "chat_template.jinja").read_text()
    refusing = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + template)
    assert answer(folder) == ANSWER


def test_the_model_goes_on_where_none_of_its_files_names_the_end(tmp_path):
    """Nothing is known by a name: with another token in all three places, the usual one ends nothing."""
    make_endless_model(tmp_path / "m")
    assert answer(tmp_path / "m").startswith(f"{ANSWER}<|im_end|>")


class Said:
    """A tokenizer that has been given a template, of which the end of a turn is not what usually stands there."""

    eos_token_id = None
    added = {"<end>": 7, "<start>": 8}
    special_tokens_map: ClassVar = {}

    def __init__(self, template):
        self.chat_template = template.format("{{ messages[0].content }}", "{{ messages[1].content }}")

    def get_added_vocab(self):
        return self.added

    def encode(self, text, add_special_tokens):
        return [self.added.get(word, 1) for word in text.split()]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{0} <start> {1} <end>", [7]),
        ("{0} <start> {1}\n\n<end> <start>", [7]),
        ("{0} <end> <start> {1}", []),
        ("{0} <end> <start> {1} and more <end>", []),
        ("{0} <end>", []),
    ],
)
def test_only_a_control_token_right_behind_the_answer_ends_a_turn(template, ends):
    said = Said(template)
    assert turn_ends(said, said, parts=False) == ends


CHAT = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi "}, {"role": "assistant", "content": "<a>"}]
# What chat templates are made of, each written as transformers writes it.
ORDINARY = [
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m['content'] | trim + '<|im_end|>' }}\n{% endfor %}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}{{ messages[-1] | tojson }}",
    "{% set n = namespace(n=0) %}{% for m in messages[::-1] %}{% set n.n = n.n + loop.index %}{% endfor %}{{ n.n }}",
    "{% macro f(m, up=false) %}{{ m.content | upper if up else m.content }}{% endmacro %}{{ f(messages[0], true) }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "{{ messages[1].content.split(' ')[0].strip('i').rstrip() ~ 1 ~ none ~ (1, 'a', [2]) ~ {'a': 1.5} }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{% break %}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v | e }};{% endfor %}",
    "{{ '%s-%02d' % ('a', 3) }}{{ '{} {:>4}'.format(1, 2) }}{{ strftime_now('%Y') }}",
    "{% generation %}{{ messages[2].content }}{% endgeneration %}{{ tools is none }}{{ documents }}",
    "{% filter upper %}a{% endfilter %}{% set x %}b{{ messages | length }}{% endset %}{{ x }}{{ eos_token }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 9 }}{{ 7 / 2 }}{{ -3 * 'a' }}{{ 'a' * 3 }}{{ [1] + [2] }}",
    "{{ messages | tojson(indent=2) }}{{ missing | default('d') }}{{ missing }}{{ bos_token is defined }}",
    "{% autoescape true %}{{ messages[2].content ~ '<' }}{% endautoescape %}{{ add_generation_prompt }}",
    "{{ (messages | map(attribute='content') | list)[0:2] }}{{ 'ab' 'cd' }}{{ range(3) | list }}{{ dict(a=1) }}",
    "{{ messages[0].content.replace('x', 'yy').startswith('yy') }}{{ 'a\\nb' | indent(2) }}{{ enable_thinking }}",
    "{{ 2.55 | round(1) }}{{ '12' | int + 1 }}{{ 'a' in 'ba' }}{{ messages[0]['role'] }}{{ messages[0]['none'] }}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_a_template_is_written_as_transformers_writes_it(demo, template):
    more = {"add_generation_prompt": True, "enable_thinking": False}
    expected = demo.tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, **more)
    assert written(Given(template), demo.tokenizer, CHAT, **more) == expected != ""


class Given:
    def __init__(self, template):
        self.chat_template = template


def twice(first, step):
    """What is doubled 99 times."""
    return "{% set n = namespace(x=" + first + ") %}{% for _ in range(99) %}" + step + "{% endfor %}{{ n.x }}"


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if a < 0 %}{% endfor %}" * 99,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [60] recursive %}{% if a %}{{ loop([a - 1, a - 1]) }}{% endif %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999) | map('string') | map('upper') | list | length %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999) | select('odd') | first %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ missing }}{% endfor %}{% endfor %}",
]
LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * [1] }}",
    "{{ 3 ** 999999 }}",
    "{{ (2 ** 4000) * (2 ** 4000) * 2 }}",
    "{{ 'ab'.center(10 ** 10) }}",
    "{{ 'ab'.zfill(10 ** 10) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6) | replace('', 'b' * 10 ** 6) }}",
    "{{ ('b' * 10 ** 6).join('a' * 10 ** 6) }}",
    "{{ range(9999) | map('string') | join('b' * 10 ** 6) }}",
    "{{ ('a\n' * 10 ** 6) | indent(999999) }}",
    "{{ 1.5 | round(10 ** 9) }}",
    "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "{{ [1, 2] | tojson(separators=('a' * 10 ** 6, 'b')) }}",
    "{{ ('a' * 10 ** 6).strip('b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6).rfind('b' + 'a' * 10 ** 5) }}",
    "{{ strftime_now('%9999999999d') }}",
    twice("'a'", "{% set n.x = n.x ~ n.x %}"),
    twice("'a'", "{% set n.x = n.x + n.x %}"),
    twice("'a'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    twice("[1]", "{% set n.x = [n.x, n.x] %}"),
    twice("[1]", "{% set n.x = (n.x, n.x) %}"),
    twice("[1]", "{% set n.x = {'a': n.x, 'b': n.x} %}"),
    twice("[1]", "{% set n.x = dict(a=n.x, b=n.x) %}"),
    twice("[1]", "{% set n.x = n.x + n.x %}"),
    "{% macro f() %}" + "a" * 10**5 + "{% endmacro %}{% for _ in range(999) %}{{ f() }}{% endfor %}",
    "{% for _ in range(999) %}" + "a" * 10**5 + "{% endfor %}",
    "{% set x = 'a' * 10 ** 6 %}{% for _ in range(999) %}{% set y = x[1:] %}{% endfor %}",
    "{% set x = 'a' * 10 ** 6 %}{% for _ in range(999) %}{% set y = x | upper %}{% endfor %}",
]
# What jinja2 has and no chat template needs: it makes or searches much from little.
WITHOUT = [
    "{{ lipsum(10 ** 9) }}",
    *(
        "{{ 'ab' | " + value + " }}"
        for value in ("center(9)", "wordwrap(1)", "batch(10 ** 9, 1)", "slice(9)", "urlize")
    ),
    *(
        "{{ " + value + " }}"
        for value in ("'a'.expandtabs(10 ** 9)", "'a'.translate({97: 'b'})", "(1).to_bytes(9, 'big')")
    ),
    "{{ 'a'.format_map({}) }}{{ messages.append(1) }}",
    "{{ namespace(__class__=1) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_never_ends_is_ended(demo, template):
    with pytest.raises(TemplateError, match="does not come to an end"):
        written(Given(template), demo.tokenizer, CHAT)


@pytest.mark.parametrize("template", LARGE)
def test_a_template_that_would_make_too_much_is_ended_before_it_does(demo, template):
    peak.begin()
    before = peak.peak_mb()
    with pytest.raises(TemplateError, match=r"^it (makes|writes|rounds|looks)"):
        written(Given(template), demo.tokenizer, CHAT)
    assert peak.peak_mb() - before < 500


@pytest.mark.parametrize("template", WITHOUT)
def test_what_no_chat_template_needs_is_not_there(demo, template):
    with pytest.raises(TemplateError):
        written(Given(template), demo.tokenizer, CHAT)


@pytest.mark.parametrize("template", ["{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if 1 %}" * 99, "a" * (1 << 18)])
def test_a_template_that_is_too_deep_or_long_is_an_error(demo, template):
    with pytest.raises((TemplateError, RecursionError, SyntaxError, ValueError)):
        written(Given(template), demo.tokenizer, CHAT)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_cancel_ends_it_at_once_and_nothing_is_left_behind(demo, template):
    """Not an error of the template: whatever the watch raises."""
    looks = []

    def check():
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    before = sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        written(Given(template), demo.tokenizer, CHAT, check)
    assert len(looks) == 3
    assert sys.gettrace() is before
    assert written(Given("{{ 1 }}"), demo.tokenizer, CHAT) == "1"


def test_a_model_whose_template_never_ends_is_loaded_and_a_question_is_cancelled(folder):
    """What ends a turn is asked of the template while the model is loaded."""
    (folder / "chat_template.jinja").write_text(ENDLESS[0])
    handle = load(LoadSpec("m"), folder, CPU)

    def cancel():
        raise InterruptedByUserError

    with pytest.raises(InterruptedByUserError):
        encode(handle, Request(handle.spec, "Hi"), [], check=cancel)
    with pytest.raises(UnusableError, match="chat template of m cannot be used: it does not come to an end"):
        encode(handle, Request(handle.spec, "Hi"), [])


class InterruptedByUserError(Exception):
    pass
