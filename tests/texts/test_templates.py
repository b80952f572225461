"""The templates say what the nodes declare and answer rightly with the double; test_comfyui.py runs them in ComfyUI."""

import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import templates
import torch
from comfy_double import _check as check_value
from pictures import draw
from PIL import Image

DEMO = "Demo-Shapes (5 MB, offline)"
THUMBNAIL_BYTES = 100_000
QWEN = ("QwenVL", "Qwen")

each_template = pytest.mark.parametrize("name", templates.names())


def declared(node):
    inputs = node.INPUT_TYPES()
    return {**inputs["required"], **inputs.get("optional", {})}


def is_widget(kind, options):
    return (isinstance(kind, list) or kind in ("STRING", "INT", "FLOAT", "BOOLEAN")) and not options.get("forceInput")


def ours(name, pack):
    """(saved node, class) of every node of ours in the template."""
    nodes = templates.workflow(name)["nodes"]
    return [
        (node, pack.NODE_CLASS_MAPPINGS[node["type"]]) for node in nodes if node["type"] in pack.NODE_CLASS_MAPPINGS
    ]


def test_every_template_has_an_answer_here():
    assert set(templates.ANSWERS) == set(templates.names())


@each_template
def test_values_stand_where_the_node_expects_them(name, pack):
    for node, kind in ours(name, pack):
        inputs = declared(kind)
        wanted = [one_input for one_input, (form, options) in inputs.items() if is_widget(form, options)]
        names = [widget_name for widget_name in templates.widget_names(node) if widget_name]
        # Widgets that came later are at the end, and have their defaults.
        assert names == wanted[: len(names)]
        for widget_name, value in zip(templates.widget_names(node), node["widgets_values"], strict=True):
            if widget_name:
                check_value(widget_name, value, *inputs[widget_name])
            else:
                assert value in ("fixed", "increment", "decrement", "randomize")


@each_template
def test_sockets_have_the_names_and_types_that_the_node_declares(name, pack):
    for node, kind in ours(name, pack):
        for slot in node["inputs"]:
            form, _ = declared(kind)[slot["name"]]
            assert slot["type"] == ("COMBO" if isinstance(form, list) else form)
        outputs = [(slot["name"], slot["type"]) for slot in node["outputs"]]
        assert outputs == list(zip(kind.RETURN_NAMES, kind.RETURN_TYPES, strict=True))


@each_template
def test_links_are_known_at_both_ends(name):
    saved = templates.workflow(name)
    nodes = {node["id"]: node for node in saved["nodes"]}
    for number, source, slot, target, place, kind in saved["links"]:
        given, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in given["links"] and taken["link"] == number
        assert given["type"] == taken["type"] == kind or "*" in (taken["type"], kind)
    ends = [slot["link"] for node in saved["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(ends) == sorted(link[0] for link in saved["links"])


def test_no_graph_lacks_its_workflow():
    assert sorted(file.stem for file in templates.graph_file("").parent.glob("*.json")) == templates.names()


@each_template
def test_what_is_asked_about_is_a_sample_that_comes_with_the_pack(name):
    samples = {file.name for file in templates.SAMPLES.iterdir()}
    script = (templates.FOLDER.parent / "web" / "samples.js").read_text(encoding="utf-8")
    assert all(f'"{sample}"' in script for sample in samples)
    loaders = [node for node in templates.workflow(name)["nodes"] if node["type"] in ("LoadImage", "LoadVideo")]
    assert all(node["widgets_values"][0] in samples for node in loaders)
    assert all(node["title"].startswith("Your ") and node["outputs"][0]["links"] for node in loaders)


@each_template
def test_it_runs_without_a_download_and_says_how_to_go_on(name):
    nodes = templates.workflow(name)["nodes"]
    asked = [values["inputs"]["model"] for values in templates.graph(name).values() if values["class_type"] in QWEN]
    assert asked == [DEMO]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    assert "-Instruct" in note and note.startswith(f"## {name}\n")


def place(node):
    """Left, top with the title, right, bottom. Our nodes grow downwards where a page shows all of their widgets."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - 30, x + width, y + (10_000 if node["type"] in QWEN else height)


@each_template
def test_no_node_lies_on_another(name):
    for one, other in combinations(map(place, templates.workflow(name)["nodes"]), 2):
        across, down = one[0] < other[2] and other[0] < one[2], one[1] < other[3] and other[1] < one[3]
        assert not (across and down)


@each_template
def test_a_small_picture_of_the_same_name_lies_beside_it(name):
    file = templates.FOLDER / f"{name}.jpg"
    assert file.stat().st_size < THUMBNAIL_BYTES
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and min(picture.size) >= 200


@dataclass
class Core:
    """What ComfyUI's own nodes of the templates do, by their names. The folder is ComfyUI's for input."""

    folder: Path

    def EmptyImage(self, width, height, batch_size, color):
        rgb = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255]) / 255
        return [rgb.expand(batch_size, height, width, 3).clone()]

    def ImageCompositeMasked(self, destination, source, x, y, resize_source):
        placed = destination.clone()
        placed[:, y : y + source.shape[1], x : x + source.shape[2]] = source
        return [placed]

    def LoadImage(self, image, upload):
        with Image.open(self.folder / image) as picture:
            return [torch.from_numpy(np.asarray(picture.convert("RGB")) / np.float32(255))[None]]

    def LoadVideo(self, file, upload):
        return [Stream(self.folder / file)]


@dataclass(frozen=True)
class Stream:
    """ComfyUI's VIDEO, of a file."""

    path: Path

    def get_stream_source(self):
        return str(self.path)


def run_in_double(comfy, pack, graph, core):
    """The outputs of the nodes that can be run here, by node: ours, and those of ComfyUI's that make their inputs."""
    results = {}
    for number in sorted(graph, key=int):
        node = graph[number]
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        if any(source not in results for source, _ in links.values()):
            continue
        inputs = node["inputs"] | {name: results[source][slot] for name, (source, slot) in links.items()}
        kind = pack.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if not getattr(kind, "INPUT_IS_LIST", False):
            inputs = {name: value[0] if name in links else value for name, value in inputs.items()}
        if kind:
            results[number] = comfy.run(kind, **inputs)
        elif of_comfyui := getattr(core, node["class_type"], None):
            results[number] = [[value] for value in of_comfyui(**inputs)]
    return results


@each_template
def test_it_gives_the_right_answer(name, comfy, pack):
    shutil.rmtree(comfy.base / "input", ignore_errors=True)
    shutil.rmtree(comfy.base / "output", ignore_errors=True)
    graph = templates.graph(name)
    if name == "Caption a folder":
        draw_input(comfy.base / "input")
    else:
        templates.put_samples(comfy.base / "input")
    result = run_in_double(comfy, pack, graph, Core(comfy.base / "input"))
    assert {number for number, node in graph.items() if node["class_type"] in pack.NODE_CLASS_MAPPINGS} <= set(result)
    assert result[asked(graph)][0] == templates.ANSWERS[name]
    assert captions(comfy.base) == (templates.ANSWERS[name] if name == "Caption a folder" else [])


def asked(graph):
    """The node that asks a model."""
    (number,) = [number for number, node in graph.items() if node["class_type"] in QWEN]
    return number


def draw_input(folder):
    """What "Caption a folder" meets."""
    folder.mkdir(exist_ok=True)
    draw("circle", "red", "blue").save(folder / "1.png")
    draw("square", "yellow", "green").save(folder / "2.png")


def captions(base):
    return [file.read_text() for file in sorted((base / "input").glob("*.txt"))]
