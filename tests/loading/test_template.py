"""Whole folders, loaded and asked: which file a template stands in, and what ends an answer."""

import json
import shutil

import pytest
import tiny
import torch
from comfyui_scene import make_endless_model
from pictures import draw

from qwenvl.errors import UnusableError
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import load
from qwenvl.loading.template import turn_ends
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
    made = tiny.decoder(handle.model).generate(prompt.inputs, request.sampling, None, ignore, ignore)
    return handle.tokenizer.decode(made.ids)


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

    def __init__(self, template):
        self._template = template

    def apply_chat_template(self, messages, tokenize):
        return self._template.format(*(each["content"] for each in messages))

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
