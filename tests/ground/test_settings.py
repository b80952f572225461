"""What is declared of a setting is what the nodes offer, what the commands take and what the Request holds."""

import argparse
import re
from dataclasses import fields

import pytest

from qwenvl.cli import common
from qwenvl.request import Frames, LoadSpec, Request, Sampling
from qwenvl.settings import ASK, CAPTION, OPTIONAL, REQUIRED, SETTINGS

# The machine says what there is of these.
BY_MACHINE = {"model", "device", "preset"}
# What is connected, and what is no part of a question.
NO_FIELD = {"keep_model_loaded", "bypass", "preset", "image1", "image2", "image3", "image4"}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.name)


class Asked(Exception):  # noqa: N818
    """A request that would be answered now."""


def another(setting):
    """A value that is not the default."""
    if setting.span:
        low, high = setting.span
        return low if setting.default != low else high
    if setting.kind == "BOOLEAN":
        return not setting.default
    return setting.choices[-1] if setting.choices else "other"


def held(request, setting):
    """What the request holds of the setting."""
    parts = [request.load, request.sampling, request.frames, request]
    (part,) = [part for part in parts if setting.attribute in {field.name for field in fields(part)}]
    return getattr(part, setting.attribute)


def test_a_name_is_declared_once():
    assert len(SETTINGS) == len(REQUIRED) + len(OPTIONAL)


@each_setting
def test_the_default_and_the_value_for_off_can_be_had_and_the_tooltip_names_the_latter(setting):
    for value in (setting.default, setting.off):
        if value is not None:
            setting.check(value)
    told = re.search(r"([\d.]+) is (?:off|no limit)\.$", setting.tooltip)
    assert not told or float(told[1]) == setting.off


@each_setting
def test_it_has_one_place_in_the_request(setting):
    held = [field.name for kind in (LoadSpec, Sampling, Frames, Request) for field in fields(kind)]
    assert held.count(setting.attribute) == (setting.name not in NO_FIELD)


@pytest.mark.parametrize("node_id", ["QwenVL", "Qwen"])
def test_every_widget_s_value_reaches_the_request(comfy, pack, monkeypatch, node_id):
    def run(request, *_):
        raise Asked(request)

    monkeypatch.setattr(pack.nodes, "run", run)
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    inputs = node.INPUT_TYPES()
    offered = {**inputs["required"], **inputs["optional"]}
    asked = [setting for name, setting in SETTINGS.items() if name in offered and "default" in offered[name][1]]
    asked = [entry for entry in asked if entry.name not in {*BY_MACHINE, *NO_FIELD, "text", "video_path"}]
    assert len(asked) > 20
    values = {entry.name: another(entry) for entry in asked}
    with pytest.raises(Asked) as caught:
        pack.nodes._answer(node, "?", values)
    (request,) = caught.value.args
    assert {entry.name: held(request, entry) for entry in asked} == {**values, "stop": ("other",)}


@pytest.mark.parametrize("which", [ASK, CAPTION])
def test_every_flag_s_value_reaches_the_request(which):
    parser = argparse.ArgumentParser()
    common.add_flags(parser, which)
    asked = [setting for setting in SETTINGS.values() if which in setting.commands and setting.name not in BY_MACHINE]
    assert len(asked) > 20
    values = {entry.name: another(entry) for entry in asked}
    written = {name: str(value).split()[0] if name == "image_resolution" else value for name, value in values.items()}
    flags = [part for name, value in written.items() for part in flag(name, value)]
    request = common.request(parser.parse_args(flags), "?", {})
    assert {entry.name: held(request, entry) for entry in asked} == {**values, "stop": ("other",)}


def flag(name, value):
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", str(value)]
