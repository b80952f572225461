import json

import pytest

from qwenvl.models import catalog
from qwenvl.models.custom import custom_engines
from qwenvl.models.engines import Engine

GOOD = {"base_url": "http://127.0.0.1:8000/v1", "model": "Qwen/Qwen3-VL-4B-Instruct"}


@pytest.fixture
def engines(tmp_path):
    """Reads a file with that under its key."""

    def read(section):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        file.write_text(json.dumps({"engines": section}))
        return list(custom_engines(file))

    return read


@pytest.fixture
def warnings(caplog):
    caplog.set_level("WARNING")
    return lambda: [record.getMessage() for record in caplog.records]


def test_an_entry_needs_an_address_and_a_model_and_the_rest_has_defaults(engines, warnings):
    assert engines({"studio": GOOD}) == [Engine("studio", GOOD["base_url"], GOOD["model"])]
    assert warnings() == []


def test_every_setting_is_taken(engines, warnings):
    entry = {
        **GOOD,
        "base_url": "https://example.com/v1/",
        "api_key_env": "STUDIO_KEY",
        "timeout_s": 3,
        "max_concurrency": 32,
        "vision": False,
        "video_url": True,
        "pixels": [4096, 65536],
        "family": "qwen2_5_vl",
    }
    (found,) = engines({"studio": entry})
    assert found == Engine(
        "studio",
        "https://example.com/v1",
        GOOD["model"],
        "STUDIO_KEY",
        3.0,
        32,
        False,
        True,
        (4096, 65536),
        "qwen2_5_vl",
    )
    assert warnings() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_url": "ftp://host/v1"}, "base_url"),
        ({"base_url": "file:///etc/passwd"}, "base_url"),
        ({"base_url": "127.0.0.1:8000"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"base_url": 8000}, "base_url"),
        ({"base_url": "https://me:sEcrEt@host/v1"}, "api_key_env"),
        ({"base_url": "https://host/v1?key=sEcrEt"}, "api_key_env"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"api_key_env": "sk-sEcrEt"}, "api_key_env"),
        ({"api_key_env": "hf_sEcrEt"}, "api_key_env"),
        ({"api_key": "sEcrEt"}, "api_key"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "60"}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": 2.5}, "max_concurrency"),
        ({"vision": "yes"}, "vision"),
        ({"video_url": 1}, "video_url"),
        ({"pixels": [100]}, "pixels"),
        ({"pixels": [200, 100]}, "pixels"),
        ({"family": "sEcrEt"}, "family must be the model_type in the model's config.json, one of: qwen2, "),
        ({"family": "Qwen/Qwen2.5-VL-7B-Instruct"}, "family"),
        ({"family": ["qwen2"]}, "family"),
        ({"family": ""}, "family"),
    ],
)
def test_a_bad_entry_costs_itself_only_and_is_named_without_its_values(engines, change, named, warnings):
    found = engines({"bad": {**GOOD, **change}, "good": GOOD})
    assert [entry.name for entry in found] == ["good"]
    (warning,) = warnings()
    assert "'bad'" in warning
    assert named in warning
    assert "sEcrEt" not in warning


@pytest.mark.parametrize("entry", ["http://host/v1", [], {}, {"base_url": GOOD["base_url"]}, None])
def test_what_is_no_entry_at_all_is_named_too(engines, entry, warnings):
    assert engines({"bad": entry}) == []
    assert "'bad'" in warnings()[0]
    assert engines(["no", "object"]) == []
    assert "1.json" in warnings()[1]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "localhost", "10.1.2.3", "192.168.0.7", "172.20.0.1", "100.64.0.9", "[fd00::1]", "gpu-box",
     "gpu.local", "gpu.internal"],
)  # fmt: skip
def test_plain_http_at_home_is_no_reason_to_warn(engines, host, warnings):
    assert engines({"studio": {**GOOD, "base_url": f"http://{host}:8000/v1"}})
    assert warnings() == []


@pytest.mark.parametrize("host", ["8.8.8.8", "[2001:4860:4860::8888]", "engine.example.com"])
def test_plain_http_across_the_internet_is_warned_of_once_and_works(engines, host, warnings):
    for _ in range(3):
        assert engines({"studio": {**GOOD, "base_url": f"http://{host}/v1"}})
    (warning,) = warnings()
    assert "plain http" in warning
    assert engines({"studio": {**GOOD, "base_url": f"https://{host}/v1"}})
    assert len(warnings()) == 1


def test_an_engine_is_in_both_lists_beside_the_models_and_found_by_its_name(tmp_path, monkeypatch):
    file = tmp_path / "custom_models.json"
    file.write_text(json.dumps({"hf_models": {"Mine": {"repo_id": "me/mine"}}, "engines": {"studio": GOOD, "x": {}}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", file)
    for names in (catalog.vision_models(), catalog.text_models()):
        assert {"Mine", "studio @ engine", catalog.DEMO} <= set(names)
        assert "x @ engine" not in names
    assert catalog.find("studio @ engine").engine == Engine("studio", **GOOD)
    assert catalog.find("Mine").engine is None


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "line 1, column 2"), ("[]", "an object"), ("3", "an object"), ('{"hf_models": {}}', None)],
)
def test_a_file_that_holds_no_engines_has_none_and_is_named_where_it_is_broken(tmp_path, warnings, content, says):
    (tmp_path / "file.json").write_text(content)
    assert custom_engines(tmp_path / "file.json") == custom_engines(tmp_path / "none.json") == ()
    assert [says in warning for warning in warnings()] == ([True] if says else [])


def test_a_bad_entry_is_named_once_until_the_file_changes(tmp_path, warnings):
    file = tmp_path / "file.json"
    for content in ({"bad": {}}, {"bad": {}, "good": GOOD}):
        file.write_text(json.dumps({"engines": content}))
        for _ in range(3):
            custom_engines(file)
    assert len(warnings()) == 2
    assert [engine.name for engine in custom_engines(file)] == ["good"]


@pytest.mark.parametrize("content", ['{"engines": ' + "[" * 5000, "1" * 5000])
def test_a_file_that_no_reader_follows_holds_no_engines(tmp_path, content):
    (tmp_path / "custom_models.json").write_text(content)
    assert custom_engines(tmp_path / "custom_models.json") == ()
