"""Model folders that were made to have something else read, loaded or run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from pictures import ROOT

from qwenvl.comfyui import host
from qwenvl.files.bounded_json import limit_of
from qwenvl.loading.capabilities import machine
from qwenvl.loading.loader import LoadError, load
from qwenvl.loading.source import find_source
from qwenvl.models import catalog
from qwenvl.models.trust import is_read, why_unsafe
from qwenvl.request import LoadSpec


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "model")


def change(folder, name, **settings):
    file = folder / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings))


def test_ordinary_folders_may_be_read(folder):
    assert why_unsafe(folder) is None
    assert why_unsafe(catalog.find(catalog.DEMO).folder) is None


@pytest.mark.parametrize(
    "target", ["../outside.json", "{base}/outside.json", "../nothing.json", "/etc/passwd", "../.."]
)
def test_a_link_out_of_the_folder_is_refused(folder, target):
    (folder.parent / "outside.json").write_text("{}")
    (folder / "vocab.json").unlink(missing_ok=True)
    (folder / "vocab.json").symlink_to(target.format(base=folder.parent))
    assert "vocab.json is a link that leads out" in why_unsafe(folder)


def test_code_that_a_library_would_run_is_refused(folder):
    """transformers 4.57 runs it, told to run no code of a folder."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").touch()
    assert "custom_generate is code" in why_unsafe(folder)


def test_a_link_among_the_other_templates_is_seen(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").symlink_to("/etc/passwd")
    assert "x.jinja is a link" in why_unsafe(folder)


def test_a_folder_that_is_a_link_itself_and_links_within_it_may_be_read(folder):
    (folder / "vocab.json").unlink(missing_ok=True)
    (folder / "vocab.json").symlink_to("tokenizer.json")
    (folder.parent / "linked").symlink_to(folder)
    assert why_unsafe(folder.parent / "linked") is None


@pytest.mark.parametrize("place", ["hub/models--owner--name/snapshots/abc", "LLM/name"])
def test_the_layout_of_the_hubs_cache_may_be_read(folder, place):
    """All of a snapshot's files are links to blobs; older versions also linked folders elsewhere to them."""
    blobs = folder.parent / "hub" / "models--owner--name" / "blobs"
    snapshot = folder.parent / place
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(blobs / f"{number:040x}")
    assert why_unsafe(snapshot) is None


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("adapter_config.json", {"base_model_name_or_path": "/elsewhere"}, "an adapter"),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/elsewhere"}}, "another model"),
        ("audio_tokenizer_config.json", {}, "another model"),
        ("config.json", {"transformers_weights": "../other/model.safetensors"}, "names its weights itself"),
        ("config.json", {"transformers_weights": "adapter_model.bin"}, "names its weights itself"),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "init_inputs"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file: '/etc/passwd'"),
        ("tokenizer_config.json", {"tokenizer_file": "../other/tokenizer.json"}, "tokenizer_file"),
        ("tokenizer_config.json", {"merges_file": "..\\other.txt"}, "merges_file"),
        # Beside the program that was started, not in the folder.
        ("tokenizer_config.json", {"tokenizer_file": "tokenizer.json"}, "tokenizer_file: 'tokenizer.json'"),
        ("tokenizer_config.json", {"special_tokens_map_file": "x.json"}, "special_tokens_map_file"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../../tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
        ("config.json", {"configuration_files": ["../../config.4.0.0.json"]}, "configuration_files"),
    ],
)
def test_settings_that_name_something_else_are_refused(folder, name, settings, reason):
    change(folder, name, **settings)
    assert reason in why_unsafe(folder)


def test_a_vocabulary_of_a_plain_name_is_refused_where_it_would_be_read(folder):
    """With all of the tokenizer in one file, nobody reads another."""
    change(folder, "tokenizer_config.json", vocab_file="vocab.json")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert "vocab_file: 'vocab.json'" in why_unsafe(folder)


ONEFORMER = {"image_processor_type": "OneFormerImageProcessor", "repo_path": "a/b", "class_info_file": "x.json"}
FOREIGN = [
    ("preprocessor_config.json", ONEFORMER, "OneFormerImageProcessor"),
    ("preprocessor_config.json", {"feature_extractor_type": "OneFormerFeatureExtractor"}, "OneFormerFeatureExtractor"),
    ("preprocessor_config.json", {"image_processor_type": ["Qwen2VLImageProcessor"]}, "['Qwen2VLImageProcessor']"),
    ("preprocessor_config.json", {"processor_class": "OneFormerProcessor"}, "OneFormerProcessor"),
    ("video_preprocessor_config.json", {"video_processor_type": "VJEPA2VideoProcessor"}, "VJEPA2VideoProcessor"),
    ("processor_config.json", {"processor_class": "BarkProcessor"}, "BarkProcessor"),
    ("processor_config.json", {"image_processor": ONEFORMER}, "OneFormerImageProcessor"),
    ("processor_config.json", {"a": [[{"feature_extractor": {"feature_extractor_type": "Dac"}}]]}, "'Dac'"),
    ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, "RagTokenizer"),
    ("tokenizer_config.json", {"processor_class": "BarkProcessor"}, "BarkProcessor"),
    ("config.json", {"tokenizer_class": "RagTokenizer"}, "RagTokenizer"),
    ("config.json", {"image_processor_type": "OneFormerImageProcessor"}, "OneFormerImageProcessor"),
    ("config.json", {"processor_class": "OneFormerProcessor"}, "OneFormerProcessor"),
    ("config.json", {"model_type": "oneformer"}, "oneformer"),
    ("config.json", {"model_type": "rag", "question_encoder": {"model_type": "dpr"}}, "not one of Qwen's"),
    ("config.json", {"vision_config": {"model_type": "timm_wrapper"}}, "timm_wrapper"),
    ("config.json", {"text_config": {"backbone_config": {"model_type": "timm_backbone"}}}, "timm_backbone"),
    ("config.json", {"vision_config": {"model_type": {}}}, "{}"),
]


@pytest.mark.parametrize(("name", "settings", "shown"), FOREIGN)
def test_a_class_that_is_none_of_qwen_s_is_refused_and_named(folder, name, settings, shown):
    change(folder, name, **settings)
    reason = why_unsafe(folder)
    assert reason.startswith(f"{name} names ")
    assert shown in reason
    assert len(reason) < 500


AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True, "modules_to_not_convert": ["visual"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "meta": {"quantizer": ["gptqmodel:2.0"], "uri": "https://a.example/b"}}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "ignore": ["lm_head", "re:.*visual.*"],
    "config_groups": {"group_0": {"targets": ["re:.*mlp/x"], "format": None, "weights": {"type": "int"}}},
    "version": "0.12.2.dev1+g1",
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
BITS = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16"}
# Under each of these, transformers looks for how weights are stored.
STORED = ["quantization_config", "compression_config"]


@pytest.mark.parametrize("stored", [AWQ, GPTQ, PACKED, FP8, BITS, {"quant_method": "bitsandbytes", **BITS}])
@pytest.mark.parametrize("key", STORED)
def test_ways_of_storing_weights_that_are_known_may_be_read(folder, key, stored):
    change(folder, "config.json", **{key: stored})
    assert why_unsafe(folder) is None
    change(folder, "config.json", **{key: None, "text_config": {"model_type": "qwen3_vl_text", key: stored}})
    assert why_unsafe(folder) is None


@pytest.mark.parametrize(
    "stored",
    [
        *(
            {"quant_method": value}
            for value in ("hqq", "torchao", "mxfp4", "auto-round", "AWQ", "", "x" * 10**6, 3, ["awq"])
        ),
        {"quant_method": None},
        {"bits": 4},
        {},
        {"quant_method": "awq", "load_in_4bit": True},  # which transformers takes for bitsandbytes
        {"quant_method": "mxfp4", "load_in_8bit": 1},
    ],
)
@pytest.mark.parametrize("key", STORED)
def test_other_ways_of_storing_weights_are_refused_and_the_known_ones_named(folder, key, stored):
    """For each, transformers loads packages and kernels by the folder's word alone."""
    change(folder, "config.json", vision_config={"depth": 1, key: stored})
    reason = why_unsafe(folder)
    assert "config.json says that its weights are stored as" in reason
    assert "Known are awq, bitsandbytes, compressed-tensors, fp8, gptq" in reason
    assert len(reason) < 500


PATHS = ["/tmp/trap.py:x", "trap.py:x", "..\\trap.py:x", "a/b", "a:b", "a\nb"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", [(), ("sparsity_config",), ("config_groups", "a"), ("transform_config", "b", "c")])
def test_compressed_weights_name_no_file_as_their_format(folder, where, path):
    """compressed-tensors takes path:name for a Python file, and runs it."""
    stored = part = json.loads(json.dumps(PACKED))
    for key in where:
        part[key] = part = {}
    part["format"] = part["type"] = path
    change(folder, "config.json", quantization_config=stored)
    assert f"config.json names {path!r} as " in why_unsafe(folder)


def test_that_would_have_run_it(tmp_path, monkeypatch):
    """What the check is for: without it, loading runs the file, which is looked for where the program was started."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    if transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 reads them in another way")
    folder = tiny.save_demo(tmp_path / "m", "compressed-tensors")
    monkeypatch.chdir(folder)
    (folder / "trap.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, "config.json", quantization_config={**stored, "format": "trap.py:x"})
    assert "not a plain name" in why_unsafe(folder)
    with pytest.raises(LoadError):
        load(LoadSpec("trap"), folder, machine("cpu"))
    assert (tmp_path / "sprung").exists()


KERNELS = ["someone/kernel", "paged|someone/kernel", {"": "sdpa", "vision_config": "a/b:c"}, 3]
WAYS = ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("key", WAYS)
def test_a_kernel_of_the_hub_for_attention_is_refused(folder, key, kernel):
    for settings in ({key: kernel}, {"vision_config": {key: kernel}}, {"a": [{"b": {key: kernel}}]}):
        file = folder / "config.json"
        before = file.read_text()
        change(folder, "config.json", **settings)
        assert f"as {key}, a kernel that transformers would fetch" in why_unsafe(folder)
        file.write_text(before)


@pytest.mark.parametrize("way", ["sonicmoe", "deepgemm", "someone/kernel", {"text_config": "sonicmoe"}, ["eager"], 1])
@pytest.mark.parametrize(
    "key", ["experts_implementation", "_experts_implementation", "_experts_implementation_internal"]
)
def test_a_kernel_of_the_hub_for_experts_is_refused(folder, key, way):
    change(folder, "config.json", text_config={"model_type": "qwen3_vl_text", key: way})
    assert f"as {key}, a kernel that transformers would fetch" in why_unsafe(folder)


@pytest.mark.parametrize("way", [None, "sdpa", "eager", "flash_attention_2", {"": "sdpa", "vision_config": None}])
def test_attention_that_finetunes_were_saved_with_may_be_named(folder, way):
    change(folder, "config.json", **dict.fromkeys(WAYS, way), _attn_implementation_autoset=True)
    change(folder, "config.json", experts_implementation="grouped_mm", _experts_implementation=None)
    assert why_unsafe(folder) is None


@pytest.mark.parametrize("name", ["", "x" * 10**6])
def test_a_class_of_any_name_is_named_briefly(folder, name):
    change(folder, "processor_config.json", processor_class=name)
    assert len(why_unsafe(folder)) < 500


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("preprocessor_config.json", {"image_processor_type": "Qwen2_5_VLImageProcessor"}),
        ("preprocessor_config.json", {"processor_class": "Qwen2_5_VLProcessor", "feature_extractor_type": None}),
        ("tokenizer_config.json", {"tokenizer_class": "Qwen2TokenizerFast"}),
        ("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("config.json", {"architectures": ["MyQwenForConditionalGeneration"]}),
        ("config.json", {"vision_config": {"model_type": "qwen3_vl"}, "text_config": {"model_type": "qwen3_vl_text"}}),
    ],
)
def test_what_qwen_s_models_and_their_finetunes_name_may_be_read(folder, name, settings):
    change(folder, name, **settings)
    assert why_unsafe(folder) is None


@pytest.mark.parametrize("family", tiny.families(*tiny.CLASSES))
def test_every_family_as_transformers_saves_it_may_be_read(tmp_path, family):
    assert why_unsafe(tiny.save(family, tmp_path / "m")) is None


@pytest.mark.parametrize("family", tiny.families(*tiny.SEEING))
def test_processors_as_transformers_saves_them_may_be_read(tmp_path, family):
    saved = tiny.save(family, tmp_path / "m")
    transformers.AutoProcessor.from_pretrained(saved, local_files_only=True).save_pretrained(saved)
    assert why_unsafe(saved) is None


def test_settings_that_only_say_where_a_model_came_from_are_none_of_them(folder):
    change(folder, "config.json", _name_or_path="/home/somebody/models/qwen", transformers_weights=None)
    change(folder, "tokenizer_config.json", name_or_path="/home/somebody", tokenizer_file=None, vocab_file="vocab.json")
    assert why_unsafe(folder) is None


READ_WHOLE = [
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "added_tokens.json", "vocab.txt"),
    *("special_tokens_map.json", "additional_chat_templates/tool_use.jinja", "tokenizer.model", "Tokenizer.JSON"),
]


@pytest.mark.parametrize("name", READ_WHOLE)
def test_a_file_that_is_read_whole_is_no_larger_than_any_model_s(folder, name):
    """Three gigabytes that take no room on the disk."""
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("ab") as file:
        file.truncate(3 << 30)
    assert f"{Path(name).name} is larger than {limit_of(name).size:,} bytes" in why_unsafe(folder)


@pytest.mark.parametrize("name", READ_WHOLE)
def test_a_pipe_in_place_of_a_file_is_refused(folder, name):
    """Whoever opens one waits until somebody writes to it."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{Path(name).name} is not a regular file" in why_unsafe(folder)


@pytest.mark.parametrize("name", ["trainer_state.json", "video.mp4", "README.md", "optimizer.pt"])
def test_what_nobody_reads_may_be_of_any_size(folder, name):
    with (folder / name).open("wb") as file:
        file.truncate(3 << 30)
    (folder / "tokenizer").mkdir()
    assert why_unsafe(folder) is None


def test_settings_that_cannot_be_read_are_left_to_who_needs_them(folder):
    (folder / "tokenizer_config.json").write_text("{")
    (folder / "config.json").write_text("[]")
    assert why_unsafe(folder) is None


SETTINGS = ["config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"]
DEEP = ["[" * 100_000, '{"a":' * 5000]
MANY = "[" + "[]," * 300_000 + "0]"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, deep) for name in SETTINGS for deep in DEEP),
        *((name, MANY) for name in [*SETTINGS, "added_tokens.json"]),
    ],
    ids=lambda value: value[:9],
)
def test_settings_that_another_reader_may_manage_are_refused(folder, name, content):
    """What cannot be looked at could name anything."""
    (folder / name).write_text(content)
    assert why_unsafe(folder).startswith(f"{name} cannot be read: it ")


def test_no_node_opens_such_a_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "custom_models.json").write_text(json.dumps({"models": {"Mine": {"path": str(folder)}}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", tmp_path / "custom_models.json")
    monkeypatch.setattr(host, "model_roots", list)
    assert find_source(LoadSpec("Mine"), None, "auto").folder == folder
    change(folder, "adapter_config.json", base_model_name_or_path="/elsewhere")
    with pytest.raises(LoadError, match=r"Mine is not opened: in .*model, adapter_config\.json"):
        find_source(LoadSpec("Mine"), None, "auto")


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return Path.touch, (self.sprung,)


WATCHED = """
import json, sys, tempfile
from pathlib import Path
folder, base = sys.argv[1:]
tempfile.gettempdir()  # which writes a file to find out where it may
INSTALLED = ("/proc/", "/sys/", "/dev/null", sys.prefix, sys.base_prefix, str(Path.cwd()))
seen = set()
def watch(event, arguments):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        seen.add(f"{event} {arguments[0]}")
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        seen.add(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(INSTALLED):
        path = Path(arguments[0])
        seen.add(f"open {path.relative_to(base) if path.is_relative_to(base) else path}")
import transformers
from qwenvl.loading.capabilities import machine
from qwenvl.loading.loader import LoadError, load
from qwenvl.models.trust import why_unsafe
from qwenvl.request import LoadSpec
sys.addaudithook(watch)
if reason := why_unsafe(Path(folder)):
    print(json.dumps({"seen": sorted(seen), "refused": reason}))
    sys.exit()
handle = load(LoadSpec("trap"), Path(folder), machine("cpu"))
configs = [handle.model.config, handle.model.config.text_config, handle.model.config.vision_config]
print(json.dumps({"seen": sorted(seen), "attention": [config._attn_implementation for config in configs]}))
"""
READ = (".json", ".jinja", ".safetensors", ".txt")


def watched(folder):
    """What opening the folder tells: `seen`, and `refused` or the `attention` of what was loaded."""
    command = [sys.executable, "-c", WATCHED, str(folder), str(folder.parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def others(told):
    """What was seen beside the opening of the model's own files: other files, connections, programs."""
    return [entry for entry in told["seen"] if not (entry.startswith("open model/") and entry.endswith(READ))]


@pytest.mark.parametrize("at", [0, 3, 6, 8, 13])
def test_a_class_that_reads_elsewhere_is_never_made(folder, at):
    """OneFormer's image processor opens a file that its settings name, and asks the hub for it."""
    (folder.parent / "x.json").write_text("{}")
    name, settings, _ = FOREIGN[at]
    change(folder, name, **{**settings, "repo_path": str(folder.parent), "class_info_file": "x.json"})
    told = watched(folder)
    assert told["refused"].startswith(f"{name} names ")
    assert others(told) == []


def test_loading_runs_no_code_of_the_folder_and_opens_no_pickle(folder, tmp_path):
    """Watched from within the interpreter, with a trap in every place where transformers knows one."""
    sprung = tmp_path / "sprung"
    for name in ("trap.py", "modeling_trap.py", "generate.py", "model.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    flash = {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    config = json.loads((folder / "config.json").read_text())
    # What only a call may ask for.
    flash |= {
        "use_kernels": True,
        "kernel_config": {"a": "someone/kernel"},
        "tp_plan": "auto",
        "trust_remote_code": True,
    }
    change(folder, "config.json", auto_map={"AutoConfig": "trap.A", "AutoModelForImageTextToText": "trap.B"}, **flash)
    change(folder, "config.json", text_config=config["text_config"] | flash)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.C", "somebody/else--trap.C"]})
    change(folder, "processor_config.json", auto_map={"AutoProcessor": "trap.D"})
    change(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "trap.E"})
    change(folder, "video_preprocessor_config.json", auto_map={"AutoVideoProcessor": "trap.F"})
    change(folder, "generation_config.json", custom_generate="custom_generate")
    told = watched(folder)
    assert not sprung.exists()
    assert others(told) == []
    opened = [entry.removeprefix("open model/") for entry in told["seen"]]
    assert [name for name in opened if not (name.endswith(".safetensors") or is_read(Path(name).name))] == []
    assert "open model/model.safetensors" in told["seen"] or "open model/config.json" in told["seen"], "it did watch"
    assert set(told["attention"]) == {"sdpa"}


@pytest.mark.parametrize("name", ["extra.json", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_a_link_to_itself_is_named(tmp_path, name):
    folder = shutil.copytree(catalog.find(catalog.DEMO).folder, tmp_path / "model")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(link)
    assert why_unsafe(folder) == f"{link.name} is a link that leads back to itself. Take it out"
