import os
from pathlib import Path

import pytest

from qwenvl import paths
from qwenvl.paths import ForbiddenPathError, is_plain_name, is_within, pasted, resolve, unwrapped, why_not_local


@pytest.fixture
def server(tmp_path):
    """A server's input folder with a picture, and a secret beside it."""
    (tmp_path / "input" / "set").mkdir(parents=True)
    (tmp_path / "input" / "set" / "a.png").touch()
    (tmp_path / "secret.png").touch()
    return tmp_path


def ask(server, value):
    """As a widget on a server that others can reach."""
    return resolve("folder", value, [server / "input"], [server / "input"])


@pytest.mark.parametrize("value", ["set/a.png", " set/a.png\n", "./set//a.png", "{base}/input/set/a.png"])
def test_what_lies_in_an_allowed_folder_is_found(server, value):
    assert ask(server, value.format(base=server)) == server / "input" / "set" / "a.png"


def test_an_allowed_folder_itself_can_be_named(server):
    assert ask(server, str(server / "input")) == ask(server, ".") == server / "input"


@pytest.mark.parametrize(
    "value",
    [
        "{base}/secret.png",
        "../secret.png",
        "set/../../secret.png",
        "set\\..\\..\\secret.png",
        "set/../set/a.png",
        "{base}/input/../secret.png",
        "{base}/input2/a.png",
        "~/secret.png",
        "/",
    ],
)
def test_what_lies_elsewhere_is_refused(server, value):
    (server / "input2").mkdir()
    with pytest.raises(ForbiddenPathError, match="not in a folder that may be reached"):
        ask(server, value.format(base=server))


def test_links_out_of_an_allowed_folder_are_refused(server):
    (server / "input" / "file").symlink_to(server / "secret.png")
    (server / "input" / "dangling").symlink_to(server / "nothing")
    (server / "input" / "folder").symlink_to(server)
    for value in ("file", "dangling", "folder/secret.png", "folder/nothing", "folder"):
        with pytest.raises(ForbiddenPathError):
            ask(server, value)


def test_a_link_within_an_allowed_folder_is_followed(server):
    (server / "input" / "link").symlink_to(server / "input" / "set")
    assert ask(server, "link/a.png") == server / "input" / "set" / "a.png"


def test_an_allowed_folder_may_be_a_link_itself(server):
    (server / "disk").mkdir()
    (server / "disk" / "b.png").touch()
    (server / "linked").symlink_to(server / "disk")
    roots = [server / "linked"]
    assert resolve("folder", "b.png", roots, roots) == server / "disk" / "b.png"


def test_the_error_is_the_same_whether_a_file_elsewhere_exists_or_not(server):
    messages = []
    for name in ("secret.png", "nothing.png"):
        with pytest.raises(ForbiddenPathError) as caught:
            ask(server, f"{server}/{name}")
        messages.append(str(caught.value).replace(name, "?"))
    assert messages[0] == messages[1]
    assert str(server / "input") not in messages[0]


@pytest.mark.parametrize("value", ["{base}/secret.png", "../secret.png"])
def test_on_loopback_any_local_path_is_found(server, value):
    found = resolve("folder", value.format(base=server), None, [server / "input"])
    assert found == server / "secret.png"


def test_home_is_understood_on_loopback(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("folder", "~/a", None, [Path("/")]) == tmp_path / "a"


def test_a_relative_path_starts_where_it_exists_and_else_at_the_first_base(server):
    bases = [server / "input" / "set", server / "input"]
    assert resolve("folder", "set", None, bases) == server / "input" / "set"
    assert resolve("folder", "new", None, bases) == server / "input" / "set" / "new"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("http://host/a.png", "URL"),
        ("file://host/share/a.png", "URL"),
        ("FILE://host/a.png", "URL"),
        ("file:a.png", "URL"),
        ("file:////host/share/a.png", "network or device"),
        ("file://localhost//host/a.png", "network or device"),
        ("file:%2f%2fhost/a.png", "URL"),
        ("file:///%2fhost/share", "network or device"),
        ("file:///%5c%5chost/share", "network or device"),
        ("file:///a%00.png", "no path can hold"),
        ('"//host/share"', "network or device"),
        ("\u202a\\\\host\\share\u202c", "network or device"),
        ("'http://host/a.png'", "URL"),
        ('"\u202a\ufeff"', "is empty"),
        ("concat:a|b", "URL"),
        ("//host/share", "network or device"),
        (r"\\host\share\a.png", "network or device"),
        (r"\/host/share", "network or device"),
        (r"\\.\PhysicalDrive0", "network or device"),
        (r"\\?\C:\a.png", "network or device"),
        (r"\??\C:\a.png", "network or device"),
        ("a\0.png", "no path can hold"),
        ("\ud800", "no path can hold"),
    ],
)
@pytest.mark.parametrize("exposed", [True, False])
def test_what_is_no_local_path_is_refused_everywhere(server, value, reason, exposed):
    with pytest.raises(ForbiddenPathError, match=reason) as caught:
        resolve("folder", value, [server / "input"] if exposed else None, [server / "input"])
    assert str(caught.value).startswith("folder: ")


@pytest.mark.parametrize("value", ["NUL", r"C:\pictures\con", "aux.png", "lpt1 .txt", r"C:\a.png:stream", "COM¹"])
def test_devices_and_streams_of_windows_are_refused_there(value):
    assert "Windows" in why_not_local(value, windows=True)


@pytest.mark.parametrize("value", ["C:\\pictures\\a.png", "console.png", "common", r"D:\nullify\a.png"])
def test_ordinary_names_pass_on_windows(value):
    assert why_not_local(value, windows=True) is None


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
@pytest.mark.parametrize("value", ["/dev/zero", "/dev/stdin", "/proc/self/environ", "pipe", "/sys/kernel"])
def test_devices_and_pipes_are_refused_on_loopback_too(tmp_path, value):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForbiddenPathError, match="device, a pipe"):
        resolve("folder", value, None, [tmp_path])


@pytest.mark.parametrize("exposed", [True, False])
def test_a_link_to_itself_leads_nowhere(tmp_path, exposed):
    """Python 3.12 and older refuse to follow it, newer ones return where they began."""
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    try:
        found = resolve("folder", "a/c", [tmp_path] if exposed else None, [tmp_path])
    except ForbiddenPathError:
        return
    assert found.parent in (tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("value", ["a" * 5000, "a/" * 5000, "a/" + "ü" * 130])
def test_what_is_longer_than_a_path_can_be_is_refused_in_a_short_message(tmp_path, value):
    """Python says so in other ways than that there is no such file."""
    with pytest.raises(ForbiddenPathError, match="longer than a path") as caught:
        resolve("folder", value, None, [tmp_path])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("windows", [True, False])
@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a.png", "/a.png", "a/b.png", "a/", "//host/share/a.png", "a\0.png", "\ud800.png"]
)
def test_what_is_no_name_of_a_file_is_known(name, windows):
    assert not is_plain_name(name, windows=windows)


@pytest.mark.parametrize("name", [r"..\a.png", r"\\host\a.png", "C:a.png", r"C:\a.png", "a.png:b", "con.png", "NUL"])
def test_names_that_only_windows_takes_for_more(name):
    assert not is_plain_name(name, windows=True)
    assert is_plain_name(name, windows=False)


@pytest.mark.parametrize("name", ["a.png", ".a", "Szene 1, ü.png", "a..b.png", "console.png", "~"])
def test_names_are_names_everywhere(name):
    assert is_plain_name(name, windows=True)
    assert is_plain_name(name, windows=False)


def test_a_setting_that_is_none_is_strict_and_told_of_once(monkeypatch, caplog):
    monkeypatch.setenv(paths.SETTING, "storng")
    assert all(paths.are_confined("127.0.0.1") for _ in range(3))
    assert [record.message for record in caplog.records if "taken as strict" in record.message] == [
        "[QwenVL] QWENVL_PATHS is 'storng', not one of auto, strict: taken as strict"
    ]


MARKS = ("\u202a{}\u202c", "\u200e{}", "\ufeff{}", "\u2068{}\u2069", "\u200b{}\u200b", "\u00a0{}\u3000", " {}\r\n")
QUOTED = (
    '"{}"',
    "'{}'",
    "\u201c{}\u201d",
    "\u201e{}\u201c",
    "\u00ab{}\u00bb",
    "`{}`",
    ' "{}" ',
    '\u202a"{}"\u202c',
    "\"'{}'\"",
)
URLS = (
    "file://{}",
    "file:{}",
    "FILE://{}",
    "file://localhost{}",
    "File://LOCALHOST{}",
    "file://127.0.0.1{}",
    '"file://{}"',
)


@pytest.mark.parametrize("form", [*MARKS, *QUOTED, *URLS, "{}"])
@pytest.mark.parametrize("exposed", [True, False])
def test_a_path_is_understood_as_it_is_pasted(server, form, exposed):
    """And it is let in, or not, as the path in it is."""
    roots = [server / "input"] if exposed else None
    allowed, secret = server / "input" / "set" / "a.png", server / "secret.png"
    assert resolve("folder", form.format(allowed), roots, [server / "input"]) == allowed
    if exposed:
        for value in (
            secret,
            server / "nothing.png",
            f"{server}/input/../secret.png",
            f"{server}/input/set/../../secret.png",
        ):
            with pytest.raises(ForbiddenPathError, match="not in a folder that may be reached"):
                resolve("folder", form.format(value), roots, [server / "input"])
    else:
        assert resolve("folder", form.format(secret), roots, [server / "input"]) == secret


@pytest.mark.parametrize("form", [*MARKS, *QUOTED])
def test_so_is_a_relative_one(server, form):
    assert ask(server, form.format("set/a.png")) == server / "input" / "set" / "a.png"
    with pytest.raises(ForbiddenPathError, match="not in a folder that may be reached"):
        ask(server, form.format("../secret.png"))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("file:///my%20set/%C3%BC.png", "/my set/ü.png"),
        ("file:///a/100%25.png", "/a/100%.png"),
        ("file:///a%2520b", "/a%20b"),
        ("file:///a%2Fb%2e%2e", "/a/b.."),
        ("file:///a/%ff.png", "/a/\udcff.png"),
        ("file:///a?b#c", "/a?b#c"),
        ("file:///a%20", "/a "),
        ("/a%20b", "/a%20b"),
        ("file:///file:///a", "/file:///a"),
        ("it's", "it's"),
        ("'a' and 'b", "'a' and 'b"),
        ('"', '"'),
        ("a\u200db", "a\u200db"),
        ("\u202aC:\\a.png", "C:\\a.png"),
    ],
)
def test_what_is_in_a_pasted_text(value, path):
    assert unwrapped(value, windows=False) == path


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ('"C:\\my set\\a.png"', "C:\\my set\\a.png"),
        ("file:///C:/my%20set/a.png", "C:/my set/a.png"),
        ("file:///c|/a.png", "c:/a.png"),
        ("file://C:/a.png", "C:/a.png"),
        ("file://localhost/C:/a.png", "C:/a.png"),
        ("file:/C:/a.png", "C:/a.png"),
        ('C:\\my set"', "C:\\my set"),
        ("\u202aC:\\a.png", "C:\\a.png"),
    ],
)
def test_what_is_in_a_text_pasted_on_windows(value, path):
    assert unwrapped(value, windows=True) == path


@pytest.mark.parametrize(
    "value",
    [
        *("file://host/share/a.png", "file:////host/share", "file://///host/share", "file:///%5C%5Chost%5Cshare"),
        *(
            "file:///C:/a.png:stream",
            "file:///C:/con",
            '"\\\\host\\share"',
            "\u202a\\\\?\\C:\\a",
            "file:\\\\host\\share",
        ),
        *("file://localhost//host/share", "file://C:/nul", '"NUL"', "\u200eaux.png\u200e"),
    ],
)
def test_on_windows_nothing_that_is_refused_comes_in_by_its_wrapping(value):
    assert why_not_local(unwrapped(value, windows=True), windows=True)


def test_at_a_prompt_a_file_of_that_very_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "'a'").touch()
    assert pasted("'a'") == "'a'"
    assert pasted("'b'") == "b"
    assert pasted("a\0") == "a\0"
    assert pasted(f"file://{tmp_path}/b%20c") == f"{tmp_path}/b c"


def test_a_folder_that_is_a_link_to_itself_holds_nothing(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert not is_within(tmp_path / "a", [loop])
    assert is_within(tmp_path / "a", [loop, tmp_path])
    assert not is_within(loop, [tmp_path])
    with pytest.raises(ForbiddenPathError, match="not in a folder that may be reached"):
        resolve("video_path", "a.mp4", [loop], [loop])
