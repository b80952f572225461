"""Killed in the middle of a download, a load, an answer, or a folder of captions: nothing is half-written, and the next
run works and gives the same answer."""

import os
import random
import re
import time
from contextlib import suppress
from shutil import rmtree

import hub_server
import psutil
import pytest
from picture_folder import CAPTIONS, SCENES
from pictures import draw
from tiny import DEMO_FOLDER

from qwenvl.models.download import why_incomplete

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
fork_server = pytest.importorskip("fork_server", reason="no fork on Windows")

ASK = ("Describe this image.", "--no-do-sample", "--verbose")
# Long enough to be killed in; what it says after its caption makes no sense, and is the same every time.
LONG = ("--min-new-tokens", "400", "--max-new-tokens", "400")
KILLED = -9
# Where nothing is drawn.
SEED = 20261124


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "tmp").mkdir()
    server = fork_server.Server({**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1"})
    server.home = home
    yield server
    server.close()


def below(folder):
    """Every file in it, with its content."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Answers:
    """Asks about a picture with the demo model, which must stay as it is, as must home and temporary files."""

    def __init__(self, server, folder, *more):
        self.server, self.log, picture = server, folder / "log", folder / "red circle.png"
        draw("circle", "red", "blue").save(picture)
        self.do = ("command", "--image", str(picture), *ASK, *more)
        self.seconds, self.text = self.whole()
        assert self.text.startswith("a red circle on a blue background")
        self.kept = self.on_disk()

    def start(self):
        return self.server.start(self.log, *self.do)

    def whole(self):
        run = self.start()
        status, seconds = run.end()
        assert status == 0, run.said()
        return seconds, re.search(r"^a red circle.*?(?=\[QwenVL\]|$)", run.said(), re.MULTILINE).group()

    def on_disk(self):
        return below(DEMO_FOLDER), below(self.server.home)

    def check(self):
        """After a kill."""
        assert self.on_disk() == self.kept
        assert self.whole()[1] == self.text
        assert self.on_disk() == self.kept


def killed_at(run, delay):
    """Whether it was still there to be killed."""
    time.sleep(max(0.0, delay))
    return run.kill() == KILLED


def test_killed_while_it_loads(server, tmp_path):
    answers = Answers(server, tmp_path)
    assert killed_at(answers.start(), 0.02)
    answers.check()


def test_killed_while_it_answers(server, tmp_path):
    answers = Answers(server, tmp_path, *LONG)
    # On a machine that is busy the moment may be missed.
    assert any(_killed_in_its_text(answers) for _ in range(5))
    answers.check()


def _killed_in_its_text(answers):
    run = answers.start()
    run.wait_for(lambda: "a red" in run.said())
    return killed_at(run, 0) and "new tokens" not in run.said()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(12):
        draw(*list(SCENES.values())[number % 4]).save(folder / f"{number}.png")
    return folder


def caption(server, folder, **order):
    do = ("command", "caption", str(folder), "--prompt", *ASK, "--batch-size", "2")
    return server.start(folder.parent / "log", *do, **order)


def check_captions(folder):
    """Those that are there are whole; returns them, and what lies there besides."""
    found = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert found == {name: list(CAPTIONS.values())[int(name.partition(".")[0]) % 4] for name in found}
    left = [file for file in folder.iterdir() if file.suffix not in (".txt", ".png")]
    assert all(file.name.startswith(".qwenvl-") for file in left)
    return found, left


def goes_on(server, folder, count=12):
    """The next run makes the rest, and takes away what an old one left."""
    for file in check_captions(folder)[1]:
        os.utime(file, (time.time() - 120,) * 2)
    run = caption(server, folder)
    assert run.end()[0] == 0, run.said()
    found, left = check_captions(folder)
    assert (len(found), left) == (count, [])


def test_killed_in_the_middle_of_writing_a_caption(server, folder):
    """The kernel ends the process at the tenth byte of whatever it writes, after the two captions of a batch."""
    run = caption(server, folder, longest_file=10)
    assert run.end()[0] < 0, run.said()
    found, left = check_captions(folder)
    # The file of the lock, which holds nothing, and the caption's.
    assert (found, sorted(file.stat().st_size for file in left)) == ({}, [0, 10])
    goes_on(server, folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for hub in hub_server.start(tmp_path, monkeypatch, DEMO_FOLDER):
        hub.fail(drip={"model.safetensors": 0.05})
        yield hub


class Downloads:
    """Fetches the demo model from a hub on loopback."""

    def __init__(self, server, hub, folder):
        self.server, self.hub, self.folder, self.log = server, hub, folder / "owner--name", folder / "log"
        names = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE")
        self.environment = {name: os.environ[name] for name in names} | {"HF_HUB_DISABLE_XET": "1"}

    def start(self):
        return self.server.start(self.log, "fetch", "owner/name", str(self.folder), environment=self.environment)

    def kill(self, run, victim):
        """The process that waits, the one that downloads for it, or both; returns when all of them are gone."""
        others = []
        with suppress(psutil.NoSuchProcess):
            others = psutil.Process(run.pid).children()
        if victim in ("downloader", "both"):
            for other in others:
                other.kill()
        # Before there is a downloader it is the other one's turn.
        status = run.end()[0] if victim == "downloader" and others else run.kill()
        assert psutil.wait_procs(others, timeout=60)[1] == []
        return status

    def check(self):
        """Whole or not at all; what has its own name is whole. Then the next run, which leaves nothing else."""
        there = {path.name: content for path, content in below(self.folder).items() if path.suffix != ".part"}
        named = {name: content for name, content in there.items() if not name.startswith(".")}
        assert named == {name: self.hub.files[name] for name in named}
        assert why_incomplete(self.folder) or named == self.hub.files
        run = self.start()
        assert run.end()[0] == 0, run.said()
        assert why_incomplete(self.folder) is None
        assert {path.name: content for path, content in below(self.folder).items()} == self.hub.files


@pytest.mark.parametrize("victim", ["waiter", "downloader"])
def test_killed_while_it_downloads(server, hub, tmp_path, victim):
    downloads = Downloads(server, hub, tmp_path)
    run = downloads.start()
    run.wait_for(lambda: any(part.stat().st_size > 300_000 for part in downloads.folder.glob("*.safetensors*")))
    assert downloads.kill(run, victim) != 0
    assert why_incomplete(downloads.folder)
    downloads.check()


# The same at moments drawn at random, so often that they come to 50 at the very least.
TIMES = {"download": 15, "load": 20, "answer": 20, "captions": 20}


class Moments:
    """Kills at random moments, until enough of them came before the end."""

    def __init__(self, what, record_property):
        self.random = random.Random(f"{SEED} {what}")
        self.times, self.killed, self.late, self.record = TIMES[what], 0, 0, record_property
        print(f"{what}: seed {SEED}")

    def __iter__(self):
        while self.killed < self.times:
            assert self.late < 2 * self.times, "the process ends sooner than the moments that are drawn"
            yield self.random
        self.record("tried", {"killed": self.killed, "had ended already": self.late, "seed": SEED})

    def count(self, killed):
        self.killed, self.late = self.killed + killed, self.late + (not killed)


@pytest.mark.long
def test_killed_at_any_moment_of_a_load(server, tmp_path, record_property):
    answers = Answers(server, tmp_path)
    moments = Moments("load", record_property)
    for draw_ in moments:
        run = answers.start()
        killed = killed_at(run, draw_.uniform(0, 0.8) * answers.seconds)
        moments.count(killed and "loaded Demo" not in run.said())
        answers.check()


@pytest.mark.long
def test_killed_at_any_moment_of_an_answer(server, tmp_path, record_property):
    answers = Answers(server, tmp_path, *LONG)
    run = answers.start()
    run.wait_for(lambda: "loaded Demo" in run.said())
    began = time.monotonic()
    run.end()
    seconds = time.monotonic() - began
    moments = Moments("answer", record_property)
    for draw_ in moments:
        run = answers.start()
        run.wait_for(lambda run=run: "loaded Demo" in run.said())
        moments.count(killed_at(run, draw_.uniform(0, 1) * seconds))
        answers.check()


@pytest.mark.long
def test_killed_at_any_moment_of_a_folder(server, folder, record_property):
    run = caption(server, folder)
    status, seconds = run.end()
    assert (status, len(check_captions(folder)[0])) == (0, 12)
    moments, found = Moments("captions", record_property), set()
    for draw_ in moments:
        for file in folder.glob("*.txt"):
            file.unlink()
        moments.count(killed_at(caption(server, folder), draw_.uniform(0, 1) * seconds))
        found.add(len(check_captions(folder)[0]))
        goes_on(server, folder)
    assert len(found) > 2, "it was killed after different numbers of captions"


@pytest.mark.long
def test_killed_at_any_moment_of_a_download(server, hub, tmp_path, record_property):
    downloads = Downloads(server, hub, tmp_path)
    _, seconds = downloads.start().end()
    moments, sizes = Moments("download", record_property), set()
    for draw_ in moments:
        rmtree(downloads.folder)
        run = downloads.start()
        time.sleep(draw_.uniform(0, 1) * seconds)
        moments.count(downloads.kill(run, draw_.choice(["waiter", "downloader", "both"])) != 0)
        sizes.add(sum(map(len, below(downloads.folder).values())))
        downloads.check()
    assert len(sizes) > 4, "it was killed after different numbers of bytes"
