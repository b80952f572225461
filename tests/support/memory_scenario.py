"""A sequence of models that come and go on a card of 10 GB, for ComfyUI's memory manager or its double's.

Run as a program it uses a real ComfyUI: memory_scenario.py COMFYUI PACK. It prints what happened, as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

MB = 1 << 20
TOTAL = 10_000 * MB
CARD = torch.device("meta", 0)  # a device that nothing can be put on, and that compares like any other
SECOND = torch.device("meta", 1)


class Story:
    """The events so far, with models of ours and of ComfyUI's."""

    def __init__(self, pack: ModuleType, management: Any, patcher_class: type) -> None:
        self._cache_module = sys.modules[f"{pack.__name__}.qwenvl.loading.cache"]
        self._loader = sys.modules[f"{pack.__name__}.qwenvl.loading.loader"]
        self._request = sys.modules[f"{pack.__name__}.qwenvl.request"]
        self._capabilities = sys.modules[f"{pack.__name__}.qwenvl.loading.capabilities"]
        memory = sys.modules[f"{pack.__name__}.qwenvl.comfyui.memory"]
        self.models = self._cache_module.ModelCache(memory.memory_manager())
        self.management = management
        self.loads: list[str] = []
        self.events: list[Any] = []
        self.core: dict[str, Any] = {}
        self._core_class = core_class(patcher_class)

    def ours(
        self,
        name: str,
        size: int,
        fails: BaseException | None = None,
        cancelled: BaseException | None = None,
        on: tuple[str, ...] = (str(CARD),),
    ) -> Any:
        """Use a model of ours of that size, in MB; it may fail to load, or be cancelled while it answers."""
        story, spec = self, self._request.LoadSpec(name)

        class Source:
            """Make a handle without a model."""

            def __init__(self) -> None:
                self.spec = spec

                self.devices = on

            def size(self) -> int:
                return size * MB

            def load(self) -> Any:
                story.loads.append(name)
                if fails:
                    raise fails
                plan = story._loader.LoadPlan("none", "sdpa")
                machine = story._capabilities.Machine(on[0], torch.float32, "", others=on[1:])
                return story._loader.ModelHandle(spec, plan, machine, torch.nn.Linear(1, 1), None, None, 0.0)

            def park(self, handle: Any) -> None:
                return None

        with self.models.turn(spec, keep=True):
            self.models.get(self.models.source(spec) or Source(), 500 * MB)
            if cancelled:
                raise cancelled
        return spec

    def theirs(self, name: str, size: int) -> None:
        """Use a model of ComfyUI's."""
        if name not in self.core:
            self.core[name] = self._core_class(size * MB)
        self.management.load_models_gpu([self.core[name]])

    def note(self, what: str) -> None:
        """Note which models are on the card now."""
        core = sorted(name for name, entry in self.core.items() if entry.loaded_size())
        self.events.append([what, [spec.model for spec in self.models.held], core, list(self.loads)])
        self.loads.clear()

    def used(self, device: torch.device) -> int:
        """Return the bytes on that card; models of ComfyUI's are on the first."""
        core = sum(entry.loaded_size() for entry in self.core.values()) if device == CARD else 0
        there = [resident for resident in self.models._residents.values() if resident.handle is not None]
        ours = [entry for entry in there if str(device) in entry.source.devices]
        return core + sum(our.size // len(our.source.devices) for our in ours)


def core_class(patcher_class: type) -> type:
    """A model of ComfyUI's that is on the card or not, built on that version's ModelPatcher."""

    class Core(patcher_class):
        def __init__(self, size: int) -> None:
            super().__init__(torch.nn.Module(), CARD, torch.device("cpu"), size=size)

        def partially_load(self, device_to: Any, extra_memory: int = 0, force_patch_weights: bool = False) -> int:
            self.model.device, self.model.model_loaded_weight_memory = device_to, self.size
            return self.size

        def partially_unload(self, *_: Any, **__: Any) -> int:
            return 0

        def detach(self, unpatch_all: bool = True) -> Any:
            if unpatch_all:
                self.model.device, self.model.model_loaded_weight_memory = self.offload_device, 0
            return self.model

    return Core


def tell(story: Story) -> list[Any]:
    """Run the whole sequence, and return the events, which a test compares."""
    story.ours("A", 3000)
    story.note("ours is loaded")
    story.ours("A", 3000)
    story.note("used again without a load")
    story.ours("B", 3000)
    story.note("two of ours that fit stay both")
    story.ours("A", 3000)
    story.ours("C", 3000)
    story.note("of three that do not fit the least recently used goes")
    story.theirs("small", 1000)
    story.note("a small core model fits beside one of them")
    story.theirs("large", 6000)
    story.note("a large core model takes their place")
    story.ours("A", 3000)
    story.note("ours takes the place of core models")
    story.management.unload_all_models()
    story.note("unload all")
    story.ours("A", 3000)
    story.note("and again after it")
    try:
        story.ours("D", 3000, fails=OSError("no such file"))
    except OSError:
        story.note("an error while loading leaves the others and nothing of its own")
    try:
        story.ours("A", 3000, cancelled=KeyboardInterrupt())
    except KeyboardInterrupt:
        story.note("a cancel leaves the model where it is")
    story.models.forget(story.ours("A", 3000))
    story.note("forgotten by us")
    story.theirs("large", 6000)
    story.note("ComfyUI goes on without it")
    return story.events


def describe_devices(story: Story) -> list[Any]:
    """Run a second sequence, of models elsewhere than on the card that ComfyUI uses."""
    story.theirs("core", 6000)
    story.ours("A", 8000, on=(str(SECOND),))
    story.note("a model on another card takes nothing from a core model")
    story.ours("B", 8000, on=(str(SECOND),))
    story.note("nor does the next, which takes the place of the first")
    story.theirs("more core", 2000)
    story.ours("RAM", 8000, on=("cpu",))
    story.note("one in RAM makes room on no card")
    story.models.free_memory(story._request.LoadSpec("RAM"), 500 * MB)
    story.note("and for its answer nowhere either")
    story.ours("both", 12_000, on=(str(CARD), str(SECOND)))
    story.note("one on both cards needs room for a half on each")
    story.ours("both", 12_000, on=(str(CARD), str(SECOND)))
    story.note("and is there the next time")
    story.theirs("core", 6000)
    story.note("it goes as a whole when one of them is needed")
    story.ours("A", 8000, on=(str(SECOND),))
    story.note("and leaves no trace on the other")
    return story.events


EXPECTED_ON_DEVICES = [
    ["a model on another card takes nothing from a core model", ["A"], ["core"], ["A"]],
    ["nor does the next, which takes the place of the first", ["B"], ["core"], ["B"]],
    [
        "one in RAM makes room on no card",
        ["B", "RAM"],
        ["core", "more core"],
        ["RAM"],
    ],
    ["and for its answer nowhere either", ["B", "RAM"], ["core", "more core"], []],
    ["one on both cards needs room for a half on each", ["RAM", "both"], [], ["both"]],
    ["and is there the next time", ["RAM", "both"], [], []],
    ["it goes as a whole when one of them is needed", ["RAM"], ["core"], []],
    ["and leaves no trace on the other", ["RAM", "A"], ["core"], ["A"]],
]
EXPECTED = [
    ["ours is loaded", ["A"], [], ["A"]],
    ["used again without a load", ["A"], [], []],
    ["two of ours that fit stay both", ["A", "B"], [], ["B"]],
    ["of three that do not fit the least recently used goes", ["A", "C"], [], ["C"]],
    ["a small core model fits beside one of them", ["A", "C"], ["small"], []],
    ["a large core model takes their place", [], ["large"], []],
    ["ours takes the place of core models", ["A"], [], ["A"]],
    ["unload all", [], [], []],
    ["and again after it", ["A"], [], ["A"]],
    ["an error while loading leaves the others and nothing of its own", ["A"], [], ["D"]],
    ["a cancel leaves the model where it is", ["A"], [], []],
    ["forgotten by us", [], [], []],
    ["ComfyUI goes on without it", [], ["large"], []],
]


def main(comfyui: str, pack_folder: str) -> None:
    sys.argv = ["main.py", "--cpu"]
    os.chdir(comfyui)
    sys.path.insert(0, comfyui)
    import comfy.options
    import utils.install_util  # noqa: F401 (first, as main.py does: a later import would find another utils)

    comfy.options.enable_args_parsing()
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    spec = importlib.util.spec_from_file_location(
        "the_pack", Path(pack_folder) / "__init__.py", submodule_search_locations=[pack_folder]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules["the_pack"] = pack
    spec.loader.exec_module(pack)
    stories = [Story(pack, management, ModelPatcher) for _ in range(2)]

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        left = TOTAL - stories[0].used(device) if device in (CARD, SECOND) else 10**12
        return (left, 0) if torch_free_too else left

    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.get_free_memory = free
    management.get_torch_device = lambda: CARD
    management.soft_empty_cache = lambda *_, **__: None
    first = tell(stories[0])
    management.unload_all_models()
    stories.pop(0).models.clear()
    print(json.dumps([first, describe_devices(stories[0])]))


if __name__ == "__main__":
    main(*sys.argv[1:])
