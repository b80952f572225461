"""Hostile model folders, loaded and asked, and hostile engines, over a real connection: right, or an error of ours.

Not one file for a module: what a folder says passes through checkpoint, budget, sound, loader and transformers.
"""

import asyncio
import json
import math
import shutil
import struct
from dataclasses import replace

import pytest
import tiny
from anything import ANYTHING, places
from fault_proxy import STREAM, fault_proxy, piece, raw, streamed
from guarded import outcome, unchanged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import draw, image
from seeds import DEMO

from qwenvl import pipeline
from qwenvl.errors import UnusableError
from qwenvl.files.bounded_json import UnreadableError
from qwenvl.loading import loader
from qwenvl.loading.cache import ModelCache
from qwenvl.loading.capabilities import machine
from qwenvl.loading.source import ModelSource
from qwenvl.models import download
from qwenvl.models.engines import Engine
from qwenvl.prompting.watch import NoWatch
from qwenvl.remote import client
from qwenvl.remote.refusals import EngineError
from qwenvl.remote.reply import Reply
from qwenvl.request import LoadSpec, Request, Sampling

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json")
ANSWER = "a red circle on a blue background"
QUESTION = Request(
    LoadSpec("m"),
    "Describe this image.",
    images={"image": draw("circle", "red", "blue")},
    sampling=Sampling(do_sample=False, max_new_tokens=len(ANSWER.split()) + 1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo):
    """After a first model has been loaded: what transformers imports then sets variables of its own."""
    return shutil.copytree(DEMO, tmp_path_factory.mktemp("hostile") / "model")


def ask(folder, question=QUESTION):
    """As a run does it: is it whole, how large is it, then its weights, and a question about a picture."""
    if reason := download.why_incomplete(folder):
        return reason
    with unchanged():
        return outcome(_ask, ModelSource(question.load, folder, machine("cpu")), question)


def _ask(source, question):
    models = ModelCache()
    try:
        models.get(source)
        return pipeline.run(question, models, NoWatch())
    finally:
        models.clear()


def with_values(folder, name, **changes):
    """The file of the demo model with other values, by path: text_config__hidden_size."""
    document = json.loads((DEMO / name).read_text())
    for path, value in changes.items():
        *way, last = path.split("__")
        part = document
        for key in way:
            part = part[key]
        part[last] = value
    (folder / name).write_text(json.dumps(document))


@pytest.fixture(autouse=True)
def whole_again(folder):
    yield
    for file in DEMO.iterdir():
        shutil.copy(file, folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"text_config__num_hidden_layers": 10**9}),
        ("config.json", {"vision_config__depth": 10**6}),
        ("config.json", {"vision_config__deepstack_visual_indexes": [0] * 10**5}),
        ("config.json", {"text_config__num_attention_heads": 10**6}),
        ("config.json", {"text_config__rope_scaling__factor": 10**4000}),
        ("config.json", {"vision_config__num_heads": -(10**4000)}),
        ("config.json", {"a": [[{"b": [10**4000]}]]}),
        ("config.json", {"text_config__ngram_vocab_size_base": 10**12}),
        ("config.json", {"text_config__vocab_size": 10**12}),
        ("config.json", {"text_config__hidden_size": -1}),
        ("config.json", {"text_config__hidden_size": 0}),
        ("config.json", {"text_config__num_attention_heads": 0}),
        ("config.json", {"text_config__head_dim": "x"}),
        ("config.json", {"vision_config__patch_size": 0}),
        ("config.json", {"text_config": []}),
        ("config.json", {"model_type": "bert"}),
        ("config.json", {"dtype": "float99"}),
        ("config.json", {"quantization_config": {"quant_method": [1], "config_groups": [5]}}),
        ("tokenizer.json", {"model": 5}),
        ("preprocessor_config.json", {"size": {"shortest_edge": "x"}}),
        ("preprocessor_config.json", {"image_processor_type": 5}),
        ("preprocessor_config.json", {"patch_size": 10**6}),
        ("preprocessor_config.json", {"merge_size": 10**4}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 10**11, "longest_edge": 65536}}),
    ],
)
def test_a_folder_that_says_what_cannot_be_is_an_error_before_memory_is_filled(folder, name, changes):
    with_values(folder, name, **changes)
    assert isinstance(ask(folder), (loader.LoadError, UnreadableError))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"text_config__rope_scaling__mrope_section": 3}, "cannot be computed"),
        ("config.json", {"image_token_id": 5}, "cannot be computed"),
        ("config.json", {"vision_config__num_heads": 3}, "cannot be computed"),
        ("preprocessor_config.json", {"image_mean": "x"}, "processor of m cannot be used"),
        ("preprocessor_config.json", {"do_rescale": {}}, "processor of m cannot be used"),
    ],
)
def test_a_folder_that_is_loaded_but_cannot_be_computed_is_an_error_of_ours(folder, name, changes, message):
    with_values(folder, name, **changes)
    found = ask(folder)
    assert isinstance(found, UnusableError)
    assert message in str(found)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        *(("eos_token_id", ids) for ids in ({}, [[1], {}], 10**30, math.nan, "x", 5000, -1, [5000, "x"])),
        *(("bos_token_id", ids) for ids in ({}, 10**30, math.nan, "x", 5000)),
        *(("pad_token_id", ids) for ids in (10**30, math.nan, 5000, -1)),
    ],
    ids=str,
)
def test_token_ids_that_are_none_of_the_model_s_are_told_of_and_left_out(folder, caplog, name, ids):
    with_values(folder, "generation_config.json", **{name: ids})
    assert ask(folder).answers[0].text.startswith(ANSWER)
    assert f"name a token that it does not have: {name} is " in caplog.text


def test_a_video_processor_that_does_not_fit_fails_videos_only(folder):
    """They are made of other files, and whoever shows pictures does not need them."""
    with_values(folder, "video_preprocessor_config.json", patch_size=10**6)
    assert ask(folder).answers[0].text == ANSWER
    found = ask(folder, replace(QUESTION, images={}, video_frames=image(*[draw("circle", "red", "blue")] * 2)))
    assert isinstance(found, UnusableError)
    assert "Videos cannot be shown to this model: its processor has patch_size 1000000" in str(found)


@pytest.mark.parametrize("changes", [{"text_config__rms_norm_eps": "x"}, {"text_config__max_position_embeddings": "0"}])
def test_settings_that_only_a_version_5_of_transformers_looks_at_are_an_error_of_ours(folder, changes):
    with_values(folder, "config.json", **changes)
    assert isinstance(ask(folder), (loader.LoadError, UnusableError))


@pytest.mark.parametrize("name", ["original_max_position_embeddings", "factor"])
@pytest.mark.parametrize("value", [[0] * 9, "x" * 9])
def test_a_text_or_list_in_place_of_a_number_is_not_multiplied(folder, name, value):
    """Nine letters a billion times are gigabytes."""
    other = {"original_max_position_embeddings": "factor", "factor": "original_max_position_embeddings"}[name]
    with_values(folder, "config.json", **{f"text_config__rope_scaling__{name}": value})
    document = json.loads((folder / "config.json").read_text())
    document["text_config"]["rope_scaling"][other] = 2**30
    (folder / "config.json").write_text(json.dumps(document))
    assert isinstance(ask(folder), (loader.LoadError, UnusableError))


def test_a_chat_template_that_fails_is_an_error_of_ours(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no pictures, please') }}")
    found = ask(folder)
    assert isinstance(found, UnusableError)
    assert "The chat template of m cannot be used: no pictures, please" in str(found)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 5000, None])
def test_a_folder_with_a_broken_file_is_loaded_or_is_an_error(folder, name, content):
    file = folder / name
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
    assert ask(folder) is not None


HEADERS = (
    *({"dtype": "F99"}, {"dtype": None}, {"shape": [10**12, 10**12]}, {"shape": [7]}, {"shape": "x"}),
    *({"data_offsets": [0, 2]}, {"data_offsets": [8, 2**62]}, {"data_offsets": []}),
    *({"shape": [1] * 9}, {"shape": [0, 2**48]}, {"shape": [True]}, {"shape": [-1, -1]}, {"shape": [8.0]}),
    *({"shape": {"8": 8}}, {"data_offsets": [0.0, 8.0]}, {"data_offsets": [False, 8]}),
)


def with_header(folder, change):
    """The weights with another header, in which `change` has altered the first tensor and all of them."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(next(tensor for name, tensor in header.items() if name != "__metadata__"), header)
    packed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + size :])


@pytest.mark.parametrize("changes", HEADERS, ids=str)
def test_weights_whose_header_was_altered_are_refused(folder, changes):
    with_header(folder, lambda tensor, _: tensor.update(changes))
    assert isinstance(ask(folder), (str, loader.LoadError))


@pytest.mark.parametrize("side", [2**48, 10**4000], ids=["large", "thousands of digits"])
def test_sides_are_looked_at_before_anything_is_computed_with_them(folder, side):
    """The product of five thousand numbers of four thousand digits each takes hours, in which nobody else runs."""
    with_header(folder, lambda tensor, _: tensor.update(shape=[side] * 5000))
    assert "is not as long as its shape says" in ask(folder)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_vl"])
@pytest.mark.parametrize("layers", [1025, 10**9])
def test_layers_are_counted_before_a_list_of_them_is_made(tmp_path, family, layers):
    """An empty tensor may claim a side of any length, so that the weights seem to hold as many."""
    folder = tiny.save(family, tmp_path / "m")
    with_header(
        folder, lambda _, header: header.update(x={"dtype": "F32", "shape": [2**47, 0], "data_offsets": [0, 0]})
    )
    config = json.loads((folder / "config.json").read_text())
    part = config.get("text_config", config)
    part["num_hidden_layers"] = layers
    part.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    found = ask(folder)
    assert isinstance(found, loader.LoadError)
    assert "num_hidden_layers is more than any model has" in str(found)


def test_a_header_that_claims_gigabytes_is_not_read(folder):
    """A file of that size that takes no room on disk."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)
    assert "not a safetensors file" in ask(folder)


def damage(folder, name, data):
    document = json.loads((DEMO / name).read_text())
    container, key = data.draw(st.sampled_from([*places(document)]))
    container[key] = data.draw(ANYTHING)
    (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("name", FILES)
@FEW
@given(data=st.data())
def test_a_folder_with_any_value_anywhere_is_loaded_or_is_an_error(folder, name, data):
    damage(folder, name, data)
    ask(folder)
    shutil.copy(DEMO / name, folder)


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
@settings(FEW, max_examples=1000)
@given(data=st.data())
def test_a_folder_with_any_value_anywhere_is_loaded_or_is_an_error_many_times(folder, name, data):
    damage(folder, name, data)
    ask(folder)
    shutil.copy(DEMO / name, folder)


def test_what_follows_a_broken_folder_is_loaded(folder):
    with_values(folder, "config.json", text_config__hidden_size=-1)
    assert isinstance(ask(folder), loader.LoadError)
    shutil.copy(DEMO / "config.json", folder)
    assert ask(folder).answers[0].text == ANSWER


def chunked(*chunks):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunks)


WHOLE = streamed(piece("Hel"), piece("lo"), piece(end="stop"), "[DONE]")


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE,
        *(WHOLE[:size] for size in range(0, len(WHOLE), len(WHOLE) // 9)),
        STREAM + b"data: " + b"x" * (3 << 20),
        STREAM + b"data: " + b"[" * 5000 + b"\n\n",
        STREAM + b'data: {"choices": [{"delta": {"content": "\\ud800"}, "finish_reason": "stop"}]}\n\n',
        STREAM + b'data: {"choices": [{"delta": {"content": 5}}]}\n\n',
        STREAM + b'data: {"error": {"code": 1e999, "message": ["a", {"b": "\\ud800"}]}}\n\n',
        STREAM + b": ping\n" * 9999,
        STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") + b"no gzip",
        chunked(b"zz\r\nno number\r\n"),
        chunked(b"ffffffffffffffffff\r\n"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/9.9 9999 \xff\xfe\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://\xff\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 400 No\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n" + b"[" * 5000,
        b"HTTP/1.1 429 No\r\nRetry-After: 9e99\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"\0" * 999,
    ],
    ids=lambda answer: f"{len(answer)} bytes, {answer[-12:]!r}",
)
def test_an_engine_that_says_anything_gives_an_answer_or_an_error(monkeypatch, answer):
    monkeypatch.setattr(client, "WAITS_S", ())

    async def ask(base_url):
        line = client.Wire(Engine("studio", base_url, "m", timeout_s=5), "")
        try:
            return await line.complete({"model": "m"}, set(), lambda reply: None)
        finally:
            await line.close()

    with fault_proxy(("127.0.0.1", 1)) as proxy:
        proxy.otherwise = raw(answer)
        found = outcome(asyncio.run, ask(proxy.base_url))
    assert isinstance(found, (Reply, EngineError))
    assert not isinstance(found, Reply) or found.ended
