"""Who may read and write what, in a real ComfyUI that listens to everybody. Skipped without COMFYUI_DIR."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import attacks
import pytest
from attacks import ALIASES, CAPTION, FILMS, LISTED, NAMES, ON_WINDOWS, PATHS, PLAIN, SETS, Ground, let_in
from comfyui_server import Client, with_the_pack

if not os.environ.get("COMFYUI_DIR"):
    pytest.skip("Set COMFYUI_DIR to a ComfyUI checkout to try the attacks on it.", allow_module_level=True)

DEMO = "Demo-Shapes (5 MB, offline)"
Door = Callable[[str], str | None]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with attacks.ground(tmp_path_factory.mktemp("reach")) as laid_out:
        yield laid_out


@pytest.fixture(scope="module")
def client(at: Ground) -> Iterator[Client]:
    """Of one server for all values."""
    server = with_the_pack(at.base, ["--listen", "0.0.0.0"])
    try:
        server.wait_until_ready()
        at.lay_out(["temp"])  # ComfyUI empties it when it starts
        yield server.client
    finally:
        server.stop()


@pytest.fixture(scope="module")
def doors(client: Client) -> dict[str, Door]:
    """Each way for a value to become a path: input -> what is said of a value, None if nothing is."""
    info = client.get("/object_info")["QwenVL"]["input"]["required"]
    question = {name: options[0].get("default") for name, (_, *options) in info.items() if options}
    question |= {"text": "Describe.", "model": DEMO, "max_new_tokens": 1, "seed": 1}
    question |= {"quantization": "none", "attention_mode": "sdpa"}
    text = {"text": "x", "names": CAPTION.replace("txt", "png"), "folder": ".", "existing": "overwrite"}
    return {
        "video_path": door(client, "QwenVL", "video_path", question),
        "load": door(client, "QwenVLLoadFolder", "folder", {"pattern": "*", "sort": "name", "limit": 0}),
        "save": door(client, "QwenVLSaveCaptions", "folder", text),
        "names": door(client, "QwenVLSaveCaptions", "names", text),
        "model": door(client, "QwenVL", "model", question),
        "preset": door(client, "QwenVL", "preset", question),
    }


def door(client: Client, node: str, name: str, others: dict[str, Any]) -> Door:
    def ask(value: str) -> str | None:
        graph = {"node": {"class_type": node, "inputs": {**others, name: value}}}
        if node != "QwenVLSaveCaptions":
            graph["preview"] = {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}
        run = client.run(graph)
        return None if run.status == "success" else run.message

    return ask


@pytest.mark.parametrize(("name", "named"), [("video_path", "video_path"), ("load", "folder"), ("save", "folder")])
def test_no_value_leads_out_of_comfyuis_folders(at: Ground, doors: dict[str, Door], name: str, named: str) -> None:
    assert let_in(at, named, PATHS, doors[name]) == []
    assert at.harm() == []


def test_names_that_mean_more_to_others_reach_nothing_else(at: Ground, doors: dict[str, Door]) -> None:
    for value in map(at.value, (*PLAIN, *ON_WINDOWS, *ALIASES)):
        doors["load"](value)
        doors["save"](value)
    for value in PLAIN:
        doors["video_path"](value)
    assert at.harm() == []


def test_no_name_of_a_caption_leads_out_of_its_folder(at: Ground, doors: dict[str, Door]) -> None:
    assert let_in(at, "names", NAMES, doors["names"], ["is not a file's name"]) == []
    assert at.harm() == []


@pytest.mark.parametrize("name", ["model", "preset"])
def test_what_is_in_no_list_is_looked_for_nowhere(at: Ground, doors: dict[str, Door], name: str) -> None:
    assert (
        let_in(at, name, LISTED, doors[name], ["is not in the list", "does not exist", "not in [", "not in (list"])
        == []
    )
    assert at.harm() == []


def test_films_in_comfyuis_folders_are_described(at: Ground, doors: dict[str, Door]) -> None:
    said = {template: doors["video_path"](at.value(template)) for template in FILMS}
    assert set(said.values()) == {None}, said


def test_sets_in_comfyuis_folders_are_loaded_and_captioned(at: Ground, doors: dict[str, Door]) -> None:
    said = {(name, template): doors[name](at.value(template)) for template in SETS for name in ("load", "save")}
    assert set(said.values()) == {None}, said
    assert (at.base / "user" / "set" / CAPTION).read_text() == "x"
    assert at.harm() == []
