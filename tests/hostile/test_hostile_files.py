"""Hostile files and texts: whatever they hold, a reader gives an answer or one of our own errors with a sentence.

Not one file for a module: what is claimed is the same of all readers. The targets, and what they hold to, are those
that benchmarks/fuzz.py feeds by the million; an input that it finds becomes a test of the module that failed.
"""

import json

import guarded
import pytest
from anything import ANYTHING, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seeds import DEEP
from targets import TARGETS

# The same examples in every run: what is new is looked for by the fuzzer.
FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=20_000)
SEEDS = {name: target.seeds() for name, target in TARGETS.items()}
# Slow to decode, and no reader of text.
BINARY = ("picture", "video", "tensor")

# How a document becomes what the target reads.
WRITTEN = {
    "custom_models": lambda text: text,
    "engines": lambda text: text,
    "config": lambda text: text,
    "boxes": lambda text: text,
    "settings": lambda text: text,
    "small_files": lambda text: bytes([len(text) % 4]) + text,
    "weights": lambda text: len(text).to_bytes(8, "little") + text + b"\0" * 8,
    "stream": lambda text: b"\xffdata: " + text + b"\n\ndata: [DONE]\n",
    "refusal": lambda text: bytes([len(text)]) + text if len(text) < 256 else b"\x10" + text,
    "presets": lambda text: b"\0" + text,
}
EVENTS = [
    {
        "choices": [{"delta": {"content": "a", "reasoning": "b"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1},
    },
    {"error": {"message": "full", "code": 503}},
]
HEADER = {"a.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
# Of the targets whose seeds are not plain JSON.
DOCUMENTS = {
    "weights": [HEADER],
    "stream": EVENTS,
    "refusal": EVENTS,
    "presets": [{"text": "a", "system": "b"}],
    "small_files": [
        {"temperature": 0.7, "top_k": 20, "do_sample": True},
        {"vocab_file": "vocab.json", "init_inputs": [], "audio_tokenizer": {}},
        {"weight_map": {"a": "model.safetensors"}},
    ],
    "boxes": [[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"point_2d": [5, 6], "text": "b"}]],
}


@st.composite
def altered(draw, name):
    """A sound document of that kind with a value or two that are not."""
    documents = DOCUMENTS.get(name) or [json.loads(seed) for seed in SEEDS[name]]
    document = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from([*places(document)] or [(document, None)]))
        if key in container if isinstance(container, dict) else key < len(container):
            container[key] = draw(ANYTHING)
    return WRITTEN[name](json.dumps(document, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))


@st.composite
def damaged(draw, name):
    """A file of that kind, cut, overwritten, or with a part of it twice."""
    content = bytearray(draw(st.sampled_from(SEEDS[name])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.binary(max_size=4))
        kind = draw(st.sampled_from(["cut", "overwrite", "insert", "repeat"]))
        if kind == "cut":
            del content[at:]
        elif kind == "overwrite":
            content[at : at + len(piece)] = piece
        else:
            content[at:at] = piece if kind == "insert" else content[at : at + 20] * 3
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_stands_its_seeds_and_the_halves_of_them(name):
    for seed in SEEDS[name]:
        for content in {seed, seed[: len(seed) // 2], seed[:-1], b""}:
            TARGETS[name](content)


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in BINARY])
def test_a_reader_stands_what_is_nested_deeper_than_it_follows(name):
    for content in DEEP:
        for first in (b"", b"\0", b"\3", b"\xff"):
            TARGETS[name](first + content)
        TARGETS[name](WRITTEN[name](content))


@pytest.mark.parametrize("name", TARGETS)
@FEW
@given(data=st.data())
def test_a_reader_stands_files_that_are_damaged(name, data):
    TARGETS[name](data.draw(damaged(name)))


@pytest.mark.parametrize("name", WRITTEN)
@FEW
@given(data=st.data())
def test_a_reader_stands_documents_with_any_values(name, data):
    TARGETS[name](data.draw(altered(name)))


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
@MANY
@given(data=st.data())
def test_a_reader_stands_files_that_are_damaged_many_times(name, data):
    TARGETS[name](data.draw(damaged(name)))


@pytest.mark.long
@pytest.mark.parametrize("name", WRITTEN)
@MANY
@given(data=st.data())
def test_a_reader_stands_documents_with_any_values_many_times(name, data):
    TARGETS[name](data.draw(altered(name)))


def test_a_target_notices_what_it_is_for(monkeypatch):
    """Errors of another kind, errors without a sentence, and what is left changed."""
    with pytest.raises(KeyError):
        guarded.outcome({}.__getitem__, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        guarded.outcome(int, "x")
    with pytest.raises(AssertionError, match="changed: environment"), guarded.unchanged():
        monkeypatch.setenv("QWENVL_HOSTILE", "1")
    kept = []
    with pytest.raises(AssertionError, match="changed: open files"), guarded.unchanged():
        kept.append(open(__file__))  # noqa: PTH123, SIM115
    kept[0].close()
