"""Values that an attacker who may queue prompts could try, and ordinary ones that must keep working.

{base} is ComfyUI's base folder, {outside} a folder beside it that must not be reached, {port} a port on which the test
listens. {outside} holds secret.mp4 and secret.png, and nothing with the name "nothing".
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pictures import draw, write_video

# For every input that is a path.
PATHS = (
    # absolute
    *("{outside}", "{outside}/", "{outside}/secret.mp4", "{outside}/secret.png", "{outside}/nothing.mp4"),
    *("/", "/etc", "/etc/passwd", "/etc/shadow", "/root"),
    *("/root/.bashrc", "/home", "/tmp", "/.", "/etc/./passwd"),
    *("{base}", "{base}/", "{base}/models", "{base}/custom_nodes", "{base}/custom_nodes/mine/__init__.py"),
    *("{base}/inputs", "{base}/input2", "{base}/input.bak/secret.mp4", "{base}/user.txt"),
    # by way of ..
    *("..", "../", "../outside"),
    *("../../outside/secret.mp4", "../../outside/nothing.mp4", "../../../../../../etc/passwd"),
    *("./../..", "set/../../../outside", "set/../a.mp4"),
    *("set/..", "...//../..", "{base}/input/../../outside/secret.mp4"),
    *("..\\..\\outside", "set\\..\\..\\..\\outside\\secret.mp4"),
    *("..\\/../outside", "..//..//outside", " ../../outside"),
    *("../../outside\n", "\t../../outside", "{base}/input/set/../../../outside", "{base}//input//..//..//outside"),
    # home
    *("~", "~/", "~/.ssh", "~/.bashrc", "~/../outside"),
    # links that lie in the input folder
    *("out", "out/", "out/secret.mp4", "out/nothing.mp4"),
    *("out/new/deep", "out.mp4", "dangling", "dangling/a", "chain"),
    *("chain/secret.mp4", "set/up/secret.mp4", "root/etc/passwd", "root", "{base}/input/out/secret.mp4", "home.mp4"),
    *("{base}/output/out/secret.mp4", "{base}/user/out", "{base}/temp/out/secret.png", "loop", "loop/a"),
    # what is no file
    *("/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/environ", "/proc/self/cwd", "/proc/1/root/etc/passwd"),
    *("/proc/self/root{outside}/secret.mp4", "/sys/kernel", "pipe.mp4", "set/pipe.mp4", "device.mp4"),
    # addresses
    *("http://127.0.0.1:{port}/a.mp4", "https://127.0.0.1:{port}/a.mp4"),
    *("HTTP://127.0.0.1:{port}", "ftp://127.0.0.1:{port}"),
    *("file:///etc/passwd", "file://{outside}/secret.mp4"),
    *("FILE:{outside}/secret.mp4", "file:out.mp4", "file:%2e%2e/a"),
    # in the wrappings that are taken off
    *('"{outside}/secret.mp4"', "'{outside}'", "\u202a{outside}/secret.mp4\u202c", "\ufeff/etc/passwd"),
    *("'\u200e..\u200e'", '"../../outside/secret.mp4"', "\u00a0~\u00a0", "'http://127.0.0.1:{port}/a.mp4'"),
    *("file://localhost{outside}/secret.mp4", "file://127.0.0.1/etc/passwd", "file://127.0.0.1:{port}/a.mp4"),
    *("file://{base}/input/%2e%2e/%2e%2e/outside", "file://{base}/input%2f..%2f..%2foutside", "file:///etc%2fpasswd"),
    *("file://{base}/input/out/secret.mp4", "file:////127.0.0.1/share", "file:///%2f127.0.0.1/share"),
    *("file:///%5c%5c127.0.0.1%5cshare", "file:///dev/zero", "'file:///etc/passwd'", "file:///etc/passwd%00"),
    *('"//127.0.0.1/share"', "\u202a\\\\127.0.0.1\\share", "\"'\"'/etc/passwd'\"'\""),
    *("concat:{outside}/secret.mp4|a.mp4", "tcp://127.0.0.1:{port}", "udp://127.0.0.1:{port}", "pipe:0", "fd:0"),
    *("rtsp://127.0.0.1:{port}/a", "rtmp://127.0.0.1:{port}/a"),
    *("srt://127.0.0.1:{port}", "unix:/tmp/a", "cache:a.mp4"),
    *("hls+http://127.0.0.1:{port}/a.m3u8", "crypto+file:{outside}/secret.mp4"),
    *("data:video/mp4;base64,AAAA", "smb://a/b"),
    *("async:file:a.mp4", "gopher://127.0.0.1:{port}/", "javascript:alert", " http://127.0.0.1:{port}/a", "ipfs://a"),
    # the network and devices, as Windows names them
    *("\\\\127.0.0.1\\share\\a.mp4", "//127.0.0.1/share/a.mp4", "\\/127.0.0.1/share", "/\\127.0.0.1\\share"),
    *("\\\\?\\C:\\a.mp4", "\\\\.\\PhysicalDrive0", "\\??\\C:\\a"),
    *("//./pipe/a", "\\\\?\\UNC\\127.0.0.1\\share", "//?/C:/a"),
    *("\\\\127.0.0.1@{port}\\DavWWWRoot\\a.mp4", "//"),
    # no path at all
    *("set/a\0.mp4", "a.mp4\0", "\0", "{outside}/secret.mp4\0.png", "\ud800", "a/\udfff.mp4"),
    *("a" * 300, "a" * 5000, "a/" * 3000, "../" * 2000 + "etc/passwd", "ü" * 200 + ".mp4"),
)  # fmt: skip
# Refused on Windows only: elsewhere they are names like others.
ON_WINDOWS = (
    *("NUL", "con", "aux.mp4", "COM1", "lpt9.txt"),
    *("COM¹.mp4", "CONIN$", "set/nul", "set\\prn.mp4", "NUL .txt", "nul:"),
    *("a.mp4:stream", "a.mp4::$DATA", "set:stream:$INDEX_ALLOCATION", "C:\\a.mp4:b", "C:\\set\\con"),
)
# The same, where only ComfyUI's folders may be reached.
ALIASES = (
    *("PROGRA~1", "SECRET~1.MP4", "set\\OUTSID~2", "C:\\PROGRA~1\\a.mp4", "A~1", "LONGNA~10.MP4"),
    *(".. \\outside", "... ", "set. \\..", "a.mp4.", "a.mp4 ", "set.\\a.mp4", "set./a.mp4", "a.mp4. . "),
)
# Names like others, so they may be found, missing or made, but they are read by nothing as more than that.
PLAIN = (
    *("~\\secret.mp4", "~root", "~root/a.mp4", "$HOME/.bashrc", "%USERPROFILE%\\a", "%2e%2e/outside", "..%2foutside"),
    *("subfile,,start,0,end,0,,:/etc/passwd", "`touch attack`", "$(touch attack)", "; touch attack", "| cat", "a\nb"),
    *("-i", "--help", "${jndi:ldap://127.0.0.1}", "{{7*7}}", "{0.__class__}", "%s%n", "*", "?", "[a-z]", "C:\\a.mp4"),
)
# For what is to be the name of a file in a folder.
NAMES = (
    *("", ".", "..", "../a.png", "../../outside/secret.png", "set/a.png", "/etc/a.png", "{outside}/secret.png"),
    *("a\0.png", "\0", "\ud800.png", "//host/a.png"),
    *("a.png/", "./a.png", "~/a.png", "file:///a.png", "out/secret.png"),
)
# For what is picked from a list: models and presets.
LISTED = (
    *("..", "../outside", "{outside}", "{outside}/model", "/etc/passwd", "", " ", ".", "out", "a\0", "\ud800"),
    *("http://127.0.0.1:{port}/model", "\\\\127.0.0.1\\share", "owner/../../outside"),
    *("Qwen/../../../etc", "~", "a" * 5000),
    *("file:///etc/passwd", "none/../../secret", "../../secret.yaml", "__import__('os')", "{text}", "*", "default/*"),
)  # fmt: skip

# Each leads to the film film.mp4 or the set of pictures set, which lie in every folder of ComfyUI.
FILMS = (
    *("film.mp4", "./film.mp4", ".//film.mp4", "  film.mp4\n", "{base}/input/film.mp4", "{base}/output/film.mp4"),
    *("{base}/temp/film.mp4", "{base}/user/film.mp4"),
    *('"film.mp4"', "\u202a{base}/input/film.mp4\u202c", "file://{base}/input/film.mp4"),
    *("file://localhost{base}/input/my%20film,%20the%202nd%20(copy).mp4", "'set/film.mp4'"),
    *("{base}//input/./film.mp4", "set/film.mp4", "set/deep/er/film.mp4"),
    *("my film, the 2nd (copy).mp4", "фильм ü 映画 🎬.mp4", "a..b.mp4", "~film.mp4"),
    *("100%03d.mp4", "{x}.mp4", "-i.mp4"),
    *("$HOME.mp4", "'quoted'.mp4", "within.mp4", "nearby/film.mp4"),
    *(".hidden.mp4", "..film.mp4", "café.mp4", "cafe\u0301.mp4"),
)  # fmt: skip
SETS = (".", "set", "set/", "./set", "{base}/input", "{base}/input/set", "{base}/output/set", "{base}/temp/set")
SETS = (*SETS, "{base}/user/set", "my set (1), ü 映", "set/deep", "nearby", "a..b", "~set", "{base}/input/nearby")


# The folders of ComfyUI that may be reached.
OPEN = ("input", "output", "temp", "user")
SET = ("a.png", "b.png")
CAPTION = "attack.txt"


@dataclass
class Ground:
    """ComfyUI's folders with films, sets and links in them, and the files that must not change.

    Attributes:
        calls: what was sent to the port that attacks name.
    """

    base: Path
    port: int
    calls: list[bytes]

    def __post_init__(self) -> None:
        self.outside = self.base.parent / "outside"
        self.outside.mkdir()
        picture = draw("circle", "red", "blue", (96, 96))
        picture.save(self.outside / "secret.png")
        (self.outside / "secret.yaml").write_text("text: secret")
        self.film = write_video(self.outside / "secret.mp4", [picture], seconds_each=1).read_bytes()
        # As people have it whose pictures lie on another disk.
        (self.base.parent / "disk").mkdir()
        (self.base / "input").symlink_to(self.base.parent / "disk")
        for name in ("models", "input2"):
            (self.base / name).mkdir()
        self.lay_out(OPEN)
        self._before = self._state()

    def value(self, template: str) -> str:
        for name, meant in {"base": self.base, "outside": self.outside, "port": self.port}.items():
            template = template.replace(f"{{{name}}}", str(meant))
        return template

    def harm(self) -> list[str]:
        """List what has changed and must not be changed by another user."""
        changed = [f"changed: {path}" for path in self._state() ^ self._before]
        places = [Path(value) for value in map(self.value, PATHS) if len(value) < 200 and value.isprintable()]
        captions = [place / CAPTION for place in places if place.is_absolute()]
        captions += [file for file in self.base.rglob(CAPTION) if file.relative_to(self.base).parts[0] not in OPEN]
        written = [caption for caption in captions if os.access(caption, os.F_OK)]
        for caption in written:
            caption.unlink()  # so that one failure does not cause others
        return [*changed, *(f"written: {caption}" for caption in written), *map(repr, self.calls)]

    def _state(self) -> set[tuple[str, int]]:
        return {(str(path), path.lstat().st_mtime_ns) for path in [self.outside, *self.outside.rglob("*")]}

    def lay_out(self, folders: Iterable[str]) -> None:
        """Put all files in their places in these folders of ComfyUI."""
        for name in folders:
            self._add_links(self.base / name)
        for file in (self.base / "input" / self.value(template).strip() for template in FILMS):
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_bytes(self.film)
        for folder in (self.base / "input" / self.value(template) for template in SETS):
            folder.mkdir(parents=True, exist_ok=True)
            for name in SET:
                shutil.copy(self.outside / "secret.png", folder / name)

    def _add_links(self, folder: Path) -> None:
        (folder / "set").mkdir(parents=True)
        (folder / "film.mp4").write_bytes(self.film)
        for name, target in {
            "nearby": "set",
            "within.mp4": "film.mp4",
            "out": self.outside,
            "out.mp4": self.outside / "secret.mp4",
            "dangling": self.outside / "nothing",
            "chain": "out",
            "set/up": self.base / "../outside",
            "root": "/",
            "home.mp4": Path.home() / ".bashrc",
            "loop": "loop",
            "device.mp4": "/dev/zero",
        }.items():
            (folder / name).symlink_to(target)
        for name in ("pipe.mp4", "set/pipe.mp4"):
            os.mkfifo(folder / name)


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Lay out the files below the folder, and record what is sent to the port."""
    if os.name == "nt":
        pytest.skip("It takes links and pipes, which Windows does not let everybody make.")
    calls: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):  # until the server is closed
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(1)
                        calls.append(connection.recv(100))

        threading.Thread(target=listen, daemon=True).start()
        (folder / "base").mkdir()
        yield Ground(folder / "base", server.getsockname()[1], calls)
        server.shutdown(socket.SHUT_RDWR)


# Why a path is refused. None of them needs a look at what is there, but for the last.
REASONS = (
    *("not in a folder that may be reached", "is a URL", "is a network or device path", "is empty"),
    *("no path can hold", "longer than a path can be", "a device, a pipe or a socket"),
)


def let_in(
    at: Ground, name: str, templates: Iterable[str], ask: Callable[[str], str | None], reasons: Iterable[str] = REASONS
) -> list[str]:
    """List what is wrong with the answers to the values: one was not refused, or a refusal reveals something.

    Args:
        name: the input, which every refusal must name.
        reasons: every refusal must name one of these, too.
        ask: returns the reason of a refusal; None if the value is not refused.
    """
    wrong = []
    for value in map(at.value, templates):
        said = ask(value)
        if said is None:
            wrong.append(f"let in: {value!r:.200}")
        elif name not in said or not any(reason in said for reason in reasons):
            wrong.append(f"{value!r:.200}: {said:.500}")
        elif "secret." in value and ask(value.replace("secret.", "absent.")) != said.replace("secret.", "absent."):
            wrong.append(f"tells what there is: {value!r:.200}: {said:.500}")
    return wrong
