import json
import math
import re
import shutil
import sys
import time

import hub_server
import pytest
import torch
from comfy_double import InterruptProcessingException, Rejected
from pictures import ROOT, draw, image, write_video
from waiting import until

DEMO = "Demo-Shapes (5 MB, offline)"


def without(names, *left_out):
    return {name: value for name, value in names.items() if name not in left_out}


SYSTEM = "You are a helpful assistant."
# The order of the inputs, each with its default: saved workflows hold values by position, so new names may only be
# added at the end of OPTIONAL. LOOKING names those that Qwen has not.
REQUIRED = {
    "system": SYSTEM,
    "text": "",
    "model": "Qwen3-VL-4B-Instruct",
    "quantization": "none",
    "attention_mode": "sdpa",
    "keep_model_loaded": True,
    "bypass": False,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 512,
    "seed": -1,
}
OPTIONAL = {
    "image1": None,
    "image2": None,
    "image3": None,
    "image4": None,
    "video_path": "",
    "release": "when ComfyUI needs memory",
    "diagnostics": "summary",
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "thinking_budget": 0,
    "stop": "",
    "thinking": "auto",
    "download": "auto",
    "device": "auto",
    "sampling": "as set",
    "image_mode": "together",
    "image_resolution": "auto",
    "video": None,
    "video_frames": None,
    "fps": 24.0,
    "sample_fps": 1.0,
    "max_frames": 64,
    "max_frame_pixels": 768 * 28 * 28,
    "max_video_tokens": 8192,
    "preset": "none",
}
LOOKING = (
    *("image1", "image2", "image3", "image4", "video_path", "image_mode", "image_resolution", "video", "video_frames"),
    *("fps", "sample_fps", "max_frames", "max_frame_pixels", "max_video_tokens"),
)
# The oldest files: seven widgets, then a path, and one picture.
OLDEST = ("text", "model", "quantization", "keep_model_loaded", "temperature", "max_new_tokens", "seed")
FROZEN = {
    "QwenVL": (REQUIRED, OPTIONAL),
    "Qwen": (
        {"system": SYSTEM, "prompt": "", **without(REQUIRED, "system", "text"), "model": "Qwen3-4B-Instruct-2507"},
        without(OPTIONAL, *LOOKING),
    ),
    "Qwen2VL": (
        {name: REQUIRED[name] for name in OLDEST},
        {"image": None, "video_path": "", **without(REQUIRED, *OLDEST), **without(OPTIONAL, "video_path")},
    ),
}
FROZEN["Qwen2.5VL"], FROZEN["Qwen2.5"] = FROZEN["QwenVL"], FROZEN["Qwen"]
SMALL = {
    "QwenVLBoxes": (
        {"image": None, "text": None, "coordinates": "auto", "stats": None, "image_resolution": "auto"},
        {"image": "IMAGE", "mask": "MASK", "boxes": "BOUNDING_BOX"},
    ),
    "QwenVLLoadFolder": (
        {"folder": "", "pattern": "*", "sort": "name", "limit": 0, "skip_captioned": False},
        {"images": "IMAGE", "names": "STRING", "folder": "STRING"},
    ),
    "QwenVLSaveCaptions": ({"text": None, "names": None, "folder": "", "existing": "skip"}, {}),
}
RED_CIRCLE = image(draw("circle", "red", "blue"))


def defaults(widgets):
    return {name: options.get("default") for name, (_, options) in widgets.items()}


@pytest.fixture
def ask(comfy, pack):
    """Runs a node with its defaults, the demo model and greedy decoding, but for what is given."""

    def run(node_id="QwenVL", **changes):
        (text,) = all_outputs(node_id, **changes)[0]
        return text

    def all_outputs(node_id="QwenVL", **changes):
        node = pack.NODE_CLASS_MAPPINGS[node_id]
        values = {**defaults(node.INPUT_TYPES()["required"]), "model": DEMO, "do_sample": False, **changes}
        declared = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}
        return comfy.run(node, **{name: value for name, value in values.items() if name in declared})

    run.all_outputs = all_outputs
    return run


def test_a_device_that_this_machine_lacks_is_refused_before_the_prompt_runs(ask):
    with pytest.raises(Rejected, match=r"Value not in list: device: 'cuda:99' not in \['auto', .*'cpu'"):
        ask(device="cuda:99")


def test_a_device_can_be_named(ask):
    assert ask(device="cpu", image1=RED_CIRCLE) == "a red circle on a blue background"


def test_the_model_s_own_sampling_can_be_asked_for(ask, caplog):
    """The demo model recommends to take the likeliest token."""
    wild = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 0, "seed": 4, "text": "Name a random color."}
    with caplog.at_level("INFO"):
        own = ask(sampling="model's own", **wild)
    assert own == ask(**{**wild, "do_sample": False})
    assert "model's own sampling (greedy)" in caplog.text


def test_node_ids_are_frozen(pack):
    assert set(pack.NODE_CLASS_MAPPINGS) == {*FROZEN, *SMALL} == set(pack.NODE_DISPLAY_NAME_MAPPINGS)


@pytest.mark.parametrize("node_id", SMALL)
def test_inputs_and_outputs_of_the_small_nodes_are_frozen(pack, node_id):
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    declared = node.INPUT_TYPES()
    inputs, outputs = SMALL[node_id]
    assert list(defaults({**declared["required"], **declared.get("optional", {})}).items()) == list(inputs.items())
    assert dict(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)) == outputs


@pytest.mark.parametrize("node_id", FROZEN)
def test_inputs_their_order_and_defaults_are_frozen(pack, node_id):
    declared = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    required, optional = FROZEN[node_id]
    assert list(defaults(declared["required"]).items()) == list(required.items())
    assert list(defaults(declared["optional"]).items()) == list(optional.items())


@pytest.mark.parametrize("node_id", FROZEN)
def test_the_text_comes_out_first_and_everything_is_explained(pack, node_id):
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    outputs = list(zip(node.RETURN_NAMES, node.RETURN_TYPES, node.OUTPUT_IS_LIST, strict=True))
    assert outputs == [("text", "STRING", True), ("thinking", "STRING", True), ("stats", "STRING", True)]
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
    assert node.DESCRIPTION
    assert node.CATEGORY == "QwenVL"
    declared = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}
    assert [name for name, (_, options) in declared.items() if not options.get("tooltip")] == []


@pytest.mark.parametrize("node_id", ["QwenVL", "Qwen"])
def test_a_first_answer_needs_few_of_the_widgets(pack, node_id):
    declared = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    inputs = {**declared["required"], **declared["optional"]}
    shown = [name for name, (_, options) in inputs.items() if "default" in options and not options.get("advanced")]
    question = "prompt" if node_id == "Qwen" else "text"
    looking = [] if node_id == "Qwen" else ["image_mode"]
    first = ["system", question, "model", "quantization", "max_new_tokens", "seed", "thinking", *looking, "preset"]
    assert shown == first


def test_ranges_hold_what_is_promised(pack):
    inputs = pack.NODE_CLASS_MAPPINGS["QwenVL"].INPUT_TYPES()["required"]
    ranges = {name: (options["min"], options["max"]) for name, (_, options) in inputs.items() if "min" in options}
    assert ranges["seed"] == (-1, 2**64 - 1)
    assert ranges["max_new_tokens"] == (1, 32768)
    assert ranges["temperature"] == (0, 2)
    assert ranges["top_k"] == (0, 200)
    assert {name: inputs[name][0] for name in ranges} == {
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), "FLOAT"),
        **dict.fromkeys(("top_k", "max_new_tokens", "seed"), "INT"),
    }
    offered = inputs["attention_mode"][0]
    assert offered[:4] == ["sdpa", "flash_attention_2", "eager", "auto"]
    assert offered[4:] == ["flash_attention_3", "flash_attention_4", "flex_attention"]


def test_a_picture_is_described(ask):
    assert ask(text="Describe this image.", image1=RED_CIRCLE) == "a red circle on a blue background"


def test_full_diagnostics_are_in_the_log_of_a_node_and_its_answer_is_the_same(ask, caplog):
    with caplog.at_level("INFO"):
        answer = ask(text="Describe this image.", image1=RED_CIRCLE, diagnostics="full")
    assert answer == "a red circle on a blue background"
    assert any(record.getMessage().startswith("[QwenVL] phases: media") for record in caplog.records)


PICTURES = [
    image(draw("circle", "red", "blue", (160, 120))),
    image(draw("square", "yellow", "green", (128, 192)), draw("circle", "pink", "black", (128, 192))),
]
CAPTIONS = [
    "a red circle on a blue background",
    "a yellow square on a green background",
    "a pink circle on a black background",
]


def test_a_list_of_pictures_of_any_size_is_answered_together_where_each_has_an_answer(comfy, pack):
    node = pack.NODE_CLASS_MAPPINGS["QwenVL"]
    values = {**defaults(node.INPUT_TYPES()["required"]), "model": DEMO, "do_sample": False}
    values |= {"text": "Describe this image.", "image1": PICTURES, "image_mode": "one answer per image"}
    texts, thinking, (stats,) = comfy.run(node, **values)
    assert (texts, len(thinking)) == (CAPTIONS, 3)
    assert json.loads(stats)["batch_size"] == 3
    assert comfy.ui == {"text": CAPTIONS}


def test_a_list_of_pictures_is_a_run_for_each_where_they_are_shown_together(comfy, pack):
    """As ComfyUI does it with the lists of every node."""
    node = pack.NODE_CLASS_MAPPINGS["QwenVL"]
    values = {**defaults(node.INPUT_TYPES()["required"]), "model": DEMO, "do_sample": False, "image1": PICTURES}
    values["text"] = ["Describe this image.", "Describe each image."]
    texts, _, stats = comfy.run(node, **values)
    assert texts[0] == CAPTIONS[0]
    assert texts[1].index("yellow square") < texts[1].index("pink circle")
    assert len(texts) == len(stats) == 2


def test_a_picture_each_gives_a_list_in_order(ask):
    pictures = image(
        draw("circle", "red", "blue"), draw("square", "green", "white"), draw("triangle", "yellow", "black")
    )
    asked = {"text": "Describe this image.", "image1": pictures[:1], "image3": pictures[1:]}
    texts, thinking, stats = ask.all_outputs(**asked, image_mode="one answer per image")
    assert texts == [
        "a red circle on a blue background",
        "a green square on a white background",
        "a yellow triangle on a black background",
    ]
    assert thinking == ["", "", ""]
    assert json.loads(stats[0])["answers"] == 3


def test_figures_come_out_as_json_that_says_what_was_done(ask):
    (text,), (thinking,), (stats,) = ask.all_outputs(
        text="Describe this image.", image1=RED_CIRCLE, thinking="on", attention_mode="flash_attention_2"
    )
    figures = json.loads(stats)
    assert (text, thinking) == ("a red circle on a blue background", "I see one image. It shows a red circle.")
    assert (figures["model"], figures["attention"], figures["seed"]) == (DEMO, "sdpa", None)
    assert "flash_attention_2" in figures["fallbacks"][0]
    assert 0 < figures["prefill_s"] <= figures["first_token_s"] <= figures["total_s"]
    for name in ("prompt_tokens", "new_tokens", "decode_tokens_per_s", "peak_bytes"):
        assert figures[name] > 0, name


def test_the_seed_that_was_drawn_is_told_and_gives_the_text_again(ask):
    asked = {"prompt": "Name a random color.", "do_sample": True, "temperature": 1.0}
    texts, _, stats = ask.all_outputs("Qwen", **asked, seed=-1)
    assert ask("Qwen", **asked, seed=json.loads(stats[0])["seed"]) == texts[0]


def test_the_page_is_told_the_text_to_keep(ask, comfy):
    pictures = image(draw("circle", "red", "blue"), draw("square", "green", "white"))
    texts = ask.all_outputs(text="Describe this image.", image1=pictures, image_mode="one answer per image")[0]
    assert comfy.ui == {"text": texts}


def test_the_page_keeps_the_text_of_every_node_that_has_one(pack):
    """Tried in a browser, which is not part of the tests; this is what would be forgotten."""
    assert pack.WEB_DIRECTORY == "./web"
    script = (ROOT / "web" / "states.js").read_text(encoding="utf-8")
    named = set(re.findall(r'"([^"]+)"', script.partition("ANSWERING = [")[2].partition("]")[0]))
    assert named == set(FROZEN)


def test_every_option_of_the_nodes_reaches_the_answer(ask):
    asked = {"text": "Describe this image.", "image1": RED_CIRCLE}
    assert ask(**asked, stop="nothing\nblue\n") == "a red circle on a"
    assert ask("Qwen", prompt="Count from 3 to 5.", stop=",") == "3"
    assert "I see one" in ask.all_outputs(**asked, thinking="on", thinking_budget=4)[1][0]
    repeated = ask(**asked, min_new_tokens=40, frequency_penalty=-2.0)
    varied = ask(**asked, min_new_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)
    assert repeated != varied
    assert len(ask(**asked, min_new_tokens=40, no_repeat_ngram_size=1)) > len(ask(**asked))
    sizes = [
        json.loads(ask.all_outputs(**asked, image_resolution=value)[2][0])["prompt_tokens"]
        for value in ("auto", "low (256x28x28)", "medium (512x28x28)")
    ]
    assert sizes == sorted(set(sizes))


def test_a_stop_can_hold_a_line_break(pack):
    from qwenvl.nodes.widgets import stops

    assert stops("END\n\n\\n\\n\n ;") == ("END", "\n\n", " ;")


class Trimmed:
    """ComfyUI's VIDEO, cut."""

    def __init__(self, path, start):
        self._path, self._start = path, start

    def get_stream_source(self):
        return self._path

    def get_active_trim_window(self):
        return self._start, 0.0


def test_videos_come_in_by_three_ways(ask, tmp_path):
    scenes = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]
    path = str(write_video(tmp_path / "v.mp4", scenes, 3))
    asked = {"text": "Describe this video."}
    assert "red" not in ask(**asked, video=Trimmed(path, 3.0))
    assert ask(**asked, video=Trimmed(path, 0.0)) == "a red circle, then a blue square"
    frames = image(*[scenes[1]] * 16, *[scenes[0]] * 16)
    assert ask(**asked, video_frames=frames, fps=8.0) == "a blue square, then a red circle"
    tokens = [
        json.loads(ask.all_outputs(**asked, video_path=path, **how)[2][0])["prompt_tokens"]
        for how in ({"max_frames": 2}, {}, {"sample_fps": 4.0})
    ]
    assert tokens == sorted(set(tokens))


def test_the_oldest_node_takes_its_one_picture(ask):
    question = {"text": "Describe this image.", "model": DEMO, "temperature": 0.0, "seed": 1, "image": RED_CIRCLE}
    assert ask("Qwen2VL", **question) == "a red circle on a blue background"


def test_a_video_is_described(ask, tmp_path):
    scenes = [draw("circle", "red", "white", (128, 128)), draw("square", "blue", "white", (128, 128))]
    answer = ask(text="Describe this video.", video_path=str(write_video(tmp_path / "v.mp4", scenes, 2)))
    assert answer.index("red circle") < answer.index("blue square")


def test_the_text_node_answers(ask):
    assert ask("Qwen", prompt="Enhance this prompt: a cat").startswith("a cat")


def test_both_nodes_share_one_model(ask, pack, comfy):
    nodes = pack.NODE_CLASS_MAPPINGS
    assert nodes["QwenVL"].models is nodes["Qwen"].models
    ask(text="Describe this image.", image1=RED_CIRCLE)
    (entry,) = comfy.memory.loaded
    patcher = entry.model
    ask("Qwen", prompt="hello")
    assert [one_patcher.model for one_patcher in comfy.memory.loaded] == [patcher]


def test_room_is_asked_for_before_a_load(ask, comfy):
    ask("Qwen", prompt="hello")
    (request,) = comfy.memory.requests
    (entry,) = comfy.memory.loaded
    assert request > 100_000
    assert entry.model.model_size() == pytest.approx(_bytes_of_the_weights(), rel=0.01)
    assert entry.device == torch.device("cpu")


def _bytes_of_the_weights():
    from qwenvl.loading.capabilities import machine
    from qwenvl.models import catalog

    stored = (catalog.find(DEMO).folder / "model.safetensors").stat().st_size
    return stored * machine("cpu").dtype.itemsize / 2


@pytest.mark.parametrize("node_id", ["QwenVL", "Qwen", "Qwen2VL"])
def test_bypass_returns_the_text_and_touches_no_model(comfy, pack, node_id):
    node = pack.NODE_CLASS_MAPPINGS[node_id]()
    text = " anything <|im_end|>\n"
    named = {"prompt" if node_id == "Qwen" else "text": text}
    assert node.inference(**named, bypass=True, model="none of ours")["result"] == ([text], [""], [""])
    assert node.models.held == []


def test_keep_off_holds_nothing_afterwards(ask, pack, comfy):
    ask(text="Describe this image.", image1=RED_CIRCLE, keep_model_loaded=False)
    assert pack.NODE_CLASS_MAPPINGS["QwenVL"].models.held == []
    assert comfy.memory.free() == comfy.memory.total


def test_release_after_the_node_is_the_same_as_keep_off(ask, pack):
    ask(text="Describe this image.", image1=RED_CIRCLE, release="after the node")
    assert pack.NODE_CLASS_MAPPINGS["QwenVL"].models.held == []


def test_release_after_the_prompt_keeps_the_model_until_then(ask, pack, comfy):
    models = pack.NODE_CLASS_MAPPINGS["QwenVL"].models
    comfy.running[0] = (0, "p", {}, {}, [])
    for text in ("Describe this image.", "Which shape is it?"):
        ask(text=text, image1=RED_CIRCLE, release="after the prompt")
    time.sleep(1)
    assert len(models.held) == 1
    del comfy.running[0]
    assert until(lambda: models.held == [])


def test_release_after_the_prompt_holds_for_a_run_that_fails_too(ask, pack, comfy):
    models = pack.NODE_CLASS_MAPPINGS["QwenVL"].models
    ask(text="Describe this image.", image1=RED_CIRCLE)
    comfy.running[0] = (0, "p", {}, {}, [])
    with pytest.raises(RuntimeError, match="still thinking"):
        ask(text="Describe this image.", image1=RED_CIRCLE, release="after the prompt", thinking="on", max_new_tokens=3)
    assert len(models.held) == 1
    del comfy.running[0]
    assert until(lambda: models.held == [])


def test_unload_models_takes_ours_and_the_next_run_loads_it_again(ask, pack, comfy):
    models = pack.NODE_CLASS_MAPPINGS["QwenVL"].models
    ask(text="Describe this image.", image1=RED_CIRCLE)
    comfy.memory.unload_all_models()
    assert models.held == []
    comfy.cache.clear()
    assert ask(text="Describe this image.", image1=RED_CIRCLE) == "a red circle on a blue background"


def test_what_waits_in_ram_goes_when_comfyui_drops_the_node(pack):
    node = pack.NODE_CLASS_MAPPINGS["QwenVL"]()
    dropped = []
    real, node.models.forget_parked = node.models.forget_parked, lambda: dropped.append(1)
    try:
        other = pack.NODE_CLASS_MAPPINGS["QwenVL"]()
        del other
    finally:
        node.models.forget_parked = real
    assert dropped == [1]


def test_progress_counts_tokens_and_ends_full(ask, comfy):
    ask(text="Describe this image.", image1=RED_CIRCLE, max_new_tokens=40)
    values = [value for value, _, _ in comfy.progress]
    assert values == sorted(values)
    assert values[0] == 1
    assert values[-1] == 40
    assert {(total, node) for _, total, node in comfy.progress} == {(40, "7")}


def test_live_text_goes_to_this_node_and_this_browser_and_ends_as_the_answer(ask, comfy):
    answer = ask(text="Describe this image.", image1=RED_CIRCLE)
    assert comfy.texts[-1] == (answer, "7", "browser")
    assert all(answer.startswith(text) for text, _, _ in comfy.texts)


def test_what_a_model_thinks_is_marked_in_the_live_text_and_gone_at_the_end(ask, comfy, monkeypatch):
    monkeypatch.setattr(sys.modules["the_pack.qwenvl.comfyui.progress"], "LIVE_TEXT_INTERVAL_S", 0.0)
    answer = ask(text="Describe this image.", image1=RED_CIRCLE, thinking="on")
    texts = [text for text, _, _ in comfy.texts]
    assert texts[-1] == answer
    assert any(text.startswith("[thinking] I see one image.") for text in texts)
    assert any(text.endswith("\n\na red") for text in texts)


def test_the_page_is_told_how_fast_and_what_is_thought_before_each_live_text(ask, comfy, monkeypatch):
    monkeypatch.setattr(sys.modules["the_pack.qwenvl.comfyui.progress"], "LIVE_TEXT_INTERVAL_S", 0.0)
    ask(text="Describe this image.", image1=RED_CIRCLE, thinking="on")
    told = [data for event, data, sid in comfy.events if (event, sid) == ("qwenvl.progress", "browser")]
    states = list(dict.fromkeys(data["state"] for data in told if data["state"] != "loading"))
    assert states == ["starting", "reading", "thinking", "answering", "done"]
    told = [data for data in told if data["text"] or data["thinking"]]
    assert len(told) == len(comfy.texts)
    counts = [data["done"] for data in told]
    assert counts == sorted(counts)
    assert told[-1]["per_s"] > 0
    assert {(data["node"], data["unit"]) for data in told} == {("7", "tokens")}
    for data, (text, _, _) in list(zip(told, comfy.texts, strict=True))[:-1]:
        assert not data["thinking"] or text.startswith(f"[thinking] {data['thinking']}\n\n")
    assert told[-1]["thinking"] == comfy.ui["thinking"][0] == "I see one image. It shows a red circle."


def test_with_many_answers_live_text_and_progress_count_them(ask, comfy, monkeypatch):
    monkeypatch.setattr(sys.modules["the_pack.qwenvl.comfyui.progress"], "LIVE_TEXT_INTERVAL_S", 0.0)
    pictures = image(draw("circle", "red", "blue"), draw("square", "green", "white"))
    answers = ask.all_outputs(text="Describe this image.", image1=pictures, image_mode="one answer per image")[0]
    texts = [text for text, _, _ in comfy.texts]
    assert texts[0].startswith("0 of 2\n\na")
    assert texts[-2] in [f"2 of 2\n\n{answer}" for answer in answers]
    assert texts[-1] == "\n\n".join(answers)
    values = [value for value, total, _ in comfy.progress if total == 2]
    assert values == sorted(values)
    assert values[-1] == 2


def test_live_text_finds_its_node_on_a_thread_of_its_own_too(ask, comfy):
    comfy.executing = False
    try:
        assert ask(text="hello") == comfy.texts[-1][0]
    finally:
        comfy.executing = True


@pytest.mark.parametrize("token", [1, 3])
def test_cancel_stops_at_that_token_and_the_next_run_works(ask, comfy, token):
    comfy.interrupt_at = token - 1
    with pytest.raises(InterruptProcessingException):
        ask(text="Describe this image.", image1=RED_CIRCLE)
    assert len(comfy.progress) == token - 1
    assert ask(text="Describe this image.", image1=RED_CIRCLE) == "a red circle on a blue background"


def test_a_fixed_seed_is_served_from_the_cache_and_minus_one_runs_again(ask, comfy):
    for seed, runs in ((5, 1), (-1, 2)):
        comfy.reset()
        for _ in range(2):
            ask("Qwen", prompt="hello", do_sample=True, seed=seed)
        assert len(comfy.texts) >= runs
        assert sum(value == 512 for value, _, _ in comfy.progress) == runs


def test_is_changed_lets_linked_values_through(pack):
    for node_id in FROZEN:
        node = pack.NODE_CLASS_MAPPINGS[node_id]
        assert node.IS_CHANGED(seed=None, bypass=None, model=None) == node.IS_CHANGED(seed=3)
        assert math.isnan(node.IS_CHANGED(seed=-1))
        assert not math.isnan(node.IS_CHANGED(seed=-1, bypass=True) or 0)


def test_a_video_file_that_changed_is_looked_at_again(pack, tmp_path):
    node, path = pack.NODE_CLASS_MAPPINGS["QwenVL"], tmp_path / "v.mp4"
    stamps = [node.IS_CHANGED(seed=1, video_path=str(path))]
    for content in ("a", "ab"):
        path.write_text(content)
        stamps += [node.IS_CHANGED(seed=1, video_path=str(path))] * 2
    assert len(set(stamps)) == 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "Qwen9-VL"}, "'Qwen9-VL' is not in the list"),
        ({"quantization": "3bit"}, "quantization: '3bit' not in"),
        ({"attention_mode": False}, "attention_mode: False not in"),
        ({"preset": "one that was deleted"}, "preset: 'one that was deleted' not in"),
        ({"temperature": 2.5}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_value_that_is_not_offered_is_refused_by_name_before_the_run(ask, changes, reason):
    with pytest.raises(Rejected, match=reason):
        ask(text="x", **changes)


def test_old_lists_values_that_have_a_meaning_are_taken(ask):
    assert ask(text="Describe this image.", image1=RED_CIRCLE, attention_mode="auto")


@pytest.mark.parametrize(("node_id", "question"), [("QwenVL", "text"), ("Qwen", "prompt")])
def test_a_preset_of_the_user_is_offered_and_fills_in_system_and_text(ask, pack, comfy, node_id, question):
    folder = comfy.base / "user" / "default" / "qwenvl" / "presets"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "my_own.yaml"
    file.write_text('system: Answer in uppercase.\ntext: "Repeat after me: {text}"\n')
    try:
        optional = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["optional"]
        offered, options = optional["preset"]
        assert (offered[0], options["default"]) == ("none", "none")
        assert {"my own", "describe briefly"} <= set(offered)
        if node_id == "QwenVL":
            assert ask(image1=RED_CIRCLE, preset="my own") == "A RED CIRCLE ON A BLUE BACKGROUND"
        file.write_text('text: "Repeat after me: {text}"\n')
        assert ask(node_id, **{question: "a cat"}, preset="my own", seed=5) == "a cat"
        file.write_text('text: "Enhance this prompt: {text}"\n')
        assert ask(node_id, **{question: "a cat"}, preset="my own", seed=5).startswith("a cat, ")
    finally:
        file.unlink()


def test_a_video_path_starts_in_comfyuis_input_folder(ask, comfy):
    (comfy.base / "input").mkdir(exist_ok=True)
    write_video(comfy.base / "input" / "v.mp4", [draw("circle", "red", "white", (128, 128))])
    assert "red circle" in ask(text="Describe this video.", video_path="v.mp4")


@pytest.mark.parametrize("name", ["there.mp4", "gone.mp4"])
def test_a_server_that_others_reach_shows_no_video_from_elsewhere(ask, pack, comfy, tmp_path, name):
    write_video(tmp_path / "there.mp4", [draw("circle", "red", "white", (128, 128))])
    comfy.args.listen = "0.0.0.0,::"
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match="not in a folder that may be reached"):
        ask(text="Describe this video.", video_path=path)
    changed = pack.NODE_CLASS_MAPPINGS["QwenVL"].IS_CHANGED
    assert changed(seed=1, video_path=path) == changed(seed=1, video_path=str(tmp_path / "other.mp4"))


@pytest.mark.parametrize("node_id", FROZEN)
def test_linked_lists_are_not_checked_before_their_value_is_known(pack, node_id):
    assert pack.NODE_CLASS_MAPPINGS[node_id].VALIDATE_INPUTS(model=None) is True


@pytest.mark.parametrize("node_id", FROZEN)
def test_a_model_that_is_nowhere_is_answered_with_names_of_the_node_s_own_list(ask, pack, node_id, monkeypatch):
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    own = set(node.INPUT_TYPES()["required"]["model"][0])
    question = "prompt" if node_id in ("Qwen", "Qwen2.5") else "text"
    for asked in ("Qwen3", "Qwen3-4B-Instruct-25", "Qwen3-VL-4B-Instruct-25", "???", ""):
        with pytest.raises(Rejected) as refused:
            ask(node_id, **{question: "x"}, model=asked)
        named = re.search(r"or pick another, as (.*)\.$", str(refused.value))[1].split(", ")
        # The demo model's name has a comma.
        assert {entry for entry in named if entry != "offline)" and not entry.startswith("Demo")} <= own, asked
    # What a link brings is only seen when the node runs.
    monkeypatch.delattr(pack.NODE_CLASS_MAPPINGS["Qwen" if question == "prompt" else "QwenVL"], "VALIDATE_INPUTS")
    monkeypatch.setattr(node, "INPUT_TYPES", lambda before=node.INPUT_TYPES: without_a_list(before(), "model"))
    with pytest.raises(ValueError, match=r"'Qwen3' is not in the list") as refused:
        ask(node_id, **{question: "x"}, model="Qwen3")
    assert ("-VL-" in str(refused.value)) == (question == "text")


def without_a_list(inputs, name):
    """As if a link brought the value: ComfyUI does not look at it then."""
    _, options = inputs["required"][name]
    return {**inputs, "required": {**inputs["required"], name: ("STRING", options)}}


@pytest.mark.parametrize("node_id", FROZEN)
def test_the_other_node_s_models_are_taken(pack, node_id):
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    assert [node.VALIDATE_INPUTS(model=name) for name in ("Qwen3-VL-4B-Instruct", "Qwen3-4B")] == [True, True]


def test_errors_are_raised_and_name_the_input(ask, tmp_path):
    with pytest.raises(ValueError, match="image2 is empty"):
        ask(text="x", image1=RED_CIRCLE, image2=RED_CIRCLE[:0])
    with pytest.raises(ValueError, match=r"there is no file .*gone\.mp4"):
        ask(text="x", video_path=str(tmp_path / "gone.mp4"))


def test_8_and_4_bit_load_in_the_inference_mode_that_comfyui_runs_nodes_in(ask):
    for quantization in ("8bit", "4bit"):
        answer = ask(text="Describe this image.", image1=RED_CIRCLE, quantization=quantization)
        assert answer == "a red circle on a blue background"


BATCH = torch.cat([RED_CIRCLE, RED_CIRCLE])


@pytest.mark.parametrize("node_id", FROZEN)
def test_a_preset_about_pictures_is_an_error_where_none_is_connected(ask, node_id):
    question = "prompt" if node_id in ("Qwen", "Qwen2.5") else "text"
    with pytest.raises(ValueError, match=r"preset 'OCR' needs a picture, and the model is shown none"):
        ask(node_id, **{question: ""}, preset="OCR")


@pytest.mark.parametrize("shown", [{"image1": BATCH}, {"image1": RED_CIRCLE, "image3": RED_CIRCLE}])
def test_pictures_are_counted_whichever_way_they_come(ask, shown):
    assert ask(preset="compare two images", **shown)
    assert ask(preset="describe the video", **shown)
    with pytest.raises(ValueError, match=r"needs two pictures, and the model is shown only one"):
        ask(preset="compare two images", image_mode="one answer per image", **shown)
    with pytest.raises(ValueError, match=r"needs two pictures, and the model is shown only one"):
        ask(preset="compare two images", image1=RED_CIRCLE)
    assert ask(preset="describe the video", video_frames=BATCH)


@pytest.mark.parametrize("node_id", ["QwenVL", "Qwen2.5VL", "Qwen2VL"])
def test_a_node_that_is_shown_nothing_says_so_and_answers(ask, comfy, caplog, node_id):
    _, _, (stats,) = ask.all_outputs(node_id, text="Hello")
    (note,) = comfy.ui["notes"]
    assert note.startswith("No picture and no video is connected")
    assert json.loads(stats)["fallbacks"] == [note]
    assert note in caplog.text


def test_what_is_shown_or_passed_through_or_asked_of_a_text_model_is_no_cause_for_that(ask, comfy, tmp_path):
    film = write_video(tmp_path / "film.mp4", [draw("circle", "red", "white", (128, 128))])
    for node_id, given in [
        ("QwenVL", {"text": "x", "image3": RED_CIRCLE}),
        ("QwenVL", {"text": "x", "video_frames": BATCH}),
        ("QwenVL", {"text": "x", "video_path": str(film)}),
        ("QwenVL", {"text": "x", "bypass": True}),
        ("Qwen2VL", {"text": "x", "image": RED_CIRCLE}),
        ("Qwen", {"prompt": "x"}),
    ]:
        ask(node_id, **given)
        assert "notes" not in comfy.ui, given


def test_a_note_is_told_once_of_many_runs(ask, comfy):
    ask.all_outputs(text=["Hello", "Hello again"])
    assert len(comfy.ui["notes"]) == 1


@pytest.fixture
def hub(pack, tmp_path, monkeypatch):
    """A hub that has the demo model as owner/name, which is among the user's own models as `Mine`."""
    catalog = sys.modules["the_pack.qwenvl.models.catalog"]
    custom = tmp_path / "custom_models.json"
    custom.write_text('{"models": {"Mine": {"repo_id": "owner/name"}}}')
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", custom)
    yield from hub_server.start(tmp_path, monkeypatch, catalog.find(DEMO).folder)


def test_a_model_that_is_missing_comes_while_the_node_shows_it_and_answers(ask, comfy, hub):
    answer = ask(text="Describe this image.", image1=RED_CIRCLE, model="Mine", max_new_tokens=40)
    assert answer == "a red circle on a blue background"
    assert (comfy.models_dir / "LLM" / "owner--name" / "model.safetensors").is_file()
    assert any(text.startswith("Downloading name: ") for text, _, _ in comfy.texts)
    assert comfy.texts[-1][0] == answer
    totals = [total for _, total, _ in comfy.progress]
    assert totals[0] > 2_000_000
    assert totals[-1] == 40
    shutil.rmtree(comfy.models_dir / "LLM")


def test_a_large_download_is_told_before_it_begins_and_a_cancel_then_asks_nobody(ask, comfy, hub):
    with pytest.raises(RuntimeError):  # this hub does not have it
        ask(text="x", model="Qwen3-VL-4B-Instruct")
    assert comfy.texts[0][0] == "Qwen3-VL-4B-Instruct is not on this machine: downloading 8.9 GB. Cancel stops it."
    assert comfy.progress[0][:2] == (0, 8_875_631_616)
    hub.asked.clear()
    comfy.interrupted = True
    with pytest.raises(InterruptProcessingException):
        ask(text="x", model="Qwen3-VL-4B-Instruct", seed=2)
    assert hub.asked == []


@pytest.mark.parametrize("node_id", FROZEN)
def test_a_missing_model_may_be_downloaded_unless_the_node_says_never(pack, node_id):
    choices, options = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["optional"]["download"]
    assert (choices, options["default"]) == (["auto", "never"], "auto")


def test_never_downloads_nothing_and_says_how_to(ask, hub):
    with pytest.raises(RuntimeError, match=r"the download policy is never.*hf download owner/name --local-dir"):
        ask(text="x", model="Mine", download="never")
    assert hub.asked == []


def test_a_folder_that_appears_is_offered_and_accepted_without_a_restart(ask, comfy, pack):
    node, folder = pack.NODE_CLASS_MAPPINGS["QwenVL"], comfy.models_dir / "LLM" / "New one"

    def offered():
        return "New one" in node.INPUT_TYPES()["required"]["model"][0]

    assert not offered()
    assert node.VALIDATE_INPUTS(model="New one") is not True
    shutil.copytree(sys.modules["the_pack.qwenvl.models.catalog"].find(DEMO).folder, folder)
    try:
        assert offered()
        answer = ask(text="Describe this image.", image1=RED_CIRCLE, model="New one", download="never")
        assert answer == "a red circle on a blue background"
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("node_id", FROZEN)
def test_the_tooltip_of_the_models_is_two_lines(pack, node_id):
    tooltip = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"]["model"][1]["tooltip"]
    assert len(tooltip.splitlines()) == 2 and max(map(len, tooltip.splitlines())) < 120


@pytest.mark.parametrize(("node_id", "first"), [("QwenVL", "Qwen3-VL-4B-Instruct"), ("Qwen", "Qwen3-4B-Instruct-2507")])
def test_a_new_node_has_the_model_that_it_always_had_whatever_lies_on_the_disk(pack, node_id, first):
    offered, options = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"]["model"]
    assert (offered[0], options["default"]) == (DEMO, first)


@pytest.mark.parametrize("name", ["Mine", "二 \x1b[31m"])
def test_comfyuis_log_calls_a_model_by_its_name(ask, comfy, name):
    folder = comfy.models_dir / "LLM" / name
    shutil.copytree(sys.modules["the_pack.qwenvl.models.catalog"].find(DEMO).folder, folder)
    try:
        ask(text="x", image1=RED_CIRCLE, model=name)
        called = {type(patcher.model.model).__name__ for patcher in comfy.memory.loaded if not patcher.dead}
    finally:
        shutil.rmtree(folder)
    assert {"Mine": "Mine"}.get(name, r"二 \x1b[31m") in called
    assert "_Holder" not in called


def test_a_search_offers_no_id_of_older_packs(pack):
    old = {name for name, node in pack.NODE_CLASS_MAPPINGS.items() if getattr(node, "DEPRECATED", False)}
    assert old == {"Qwen2.5VL", "Qwen2.5", "Qwen2VL"}
    for name in old:
        node = pack.NODE_CLASS_MAPPINGS[name]
        assert node.models is pack.NODE_CLASS_MAPPINGS["QwenVL"].models, "or its models would be loaded twice"


@pytest.mark.parametrize(
    ("word", "node_id"),
    [
        *((word, "QwenVL") for word in ("caption", "describe", "interrogate", "img2txt", "vlm", "vision", "反推")),
        *((word, "Qwen") for word in ("llm", "prompt", "chat", "enhance", "translate", "提示词")),
        *((word, "QwenVLBoxes") for word in ("bbox", "detection", "grounding")),
        *((word, "QwenVLLoadFolder") for word in ("dataset", "load images")),
        *((word, "QwenVLSaveCaptions") for word in ("dataset", "txt")),
    ],
)
def test_nodes_are_found_by_what_they_are_for(pack, word, node_id):
    aliases = pack.NODE_CLASS_MAPPINGS[node_id].SEARCH_ALIASES
    assert word in aliases
    assert len(set(aliases)) == len(aliases) and all(alias == alias.lower() for alias in aliases)
