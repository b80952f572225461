import shutil

import hub_server
import pytest
import tiny

from qwenvl import catalog, host
from qwenvl.download import DownloadError, why_incomplete
from qwenvl.loader import LoadError
from qwenvl.request import LoadSpec
from qwenvl.source import find_source

MINE = LoadSpec("Mine")


class Watch:
    def __init__(self):
        self.texts = []

    def check(self):
        pass

    def report(self, done, total, text):
        self.texts.append(text)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """One folder of models, and `Mine` among the user's own."""
    custom = tmp_path / "custom_models.json"
    custom.write_text('{"models": {"Mine": {"repo_id": "owner/name"}}}')
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", custom)
    monkeypatch.setattr(host, "model_roots", lambda: [tmp_path / "LLM", tmp_path / "more"])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from hub_server.start(tmp_path, monkeypatch, tiny.DEMO_FOLDER)


def test_a_model_that_is_nowhere_is_fetched_into_the_first_folder_under_its_owner(hub, tmp_path):
    watch = Watch()
    source = find_source(MINE, watch, "auto")
    assert source.folder == tmp_path / "LLM" / "owner--name"
    assert why_incomplete(source.folder) is None
    assert watch.texts[-1].startswith("Downloading name: 2.9 of 2.9 MB")


def test_a_model_that_is_there_is_not_asked_for(hub, tmp_path):
    folder = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "more" / "name")
    assert find_source(MINE, Watch(), "auto").folder == folder
    assert hub.asked == []


@pytest.mark.parametrize(("policy", "offline"), [("never", ""), ("auto", "1"), ("never", "1")])
def test_where_nothing_may_be_fetched_the_error_names_the_folders_and_the_command(
    hub, tmp_path, monkeypatch, policy, offline
):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(DownloadError) as caught:
        find_source(MINE, Watch(), policy)
    message = str(caught.value)
    assert "Mine is not on this machine, and" in message
    assert ("HF_HUB_OFFLINE is set" if offline else "the download policy is never") in message
    for place in ("LLM", "more", "hub"):
        assert str(tmp_path / place) in message
    assert message.endswith(f'hf download owner/name --local-dir "{tmp_path / "LLM" / "owner--name"}"')
    assert hub.asked == []


def test_what_the_command_of_the_error_fetches_is_then_found(tmp_path):
    shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "owner--name")
    assert find_source(MINE, Watch(), "never").folder == tmp_path / "LLM" / "owner--name"


def test_a_folder_of_the_user_s_that_is_not_whole_is_left_alone(hub, tmp_path):
    theirs = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "name")
    (theirs / "model.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in theirs.iterdir()}
    assert find_source(MINE, Watch(), "auto").folder == tmp_path / "LLM" / "owner--name"
    assert {path: path.stat().st_mtime_ns for path in theirs.iterdir()} == before


def test_a_damaged_folder_without_a_repository_says_what_is_missing(tmp_path):
    folder = shutil.copytree(tiny.DEMO_FOLDER, tmp_path / "LLM" / "Found")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(LoadError, match=r"Found is damaged: model\.safetensors has .* bytes instead of .* in .*Found"):
        find_source(LoadSpec("Found"), Watch(), "auto")
