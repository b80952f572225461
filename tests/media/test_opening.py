"""Files that name other files and addresses: a film or a picture opens nothing but itself."""

import io
import os
import socket
import stat
import threading

import av
import numpy as np
import pytest
from pictures import draw, write_video
from PIL import Image

from qwenvl.media.media import MediaError, pictures, read_video
from qwenvl.media.opening import FILMS, PICTURES, open_picture
from qwenvl.request import Frames

M3U8 = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{target}'\n"
MPD = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
 mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>
<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1000"><BaseURL>{target}</BaseURL>
<SegmentBase indexRange="0-100"/></Representation></AdaptationSet></Period></MPD>"""
KEY = '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:9,\na.ts\n#EXT-X-ENDLIST\n'
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
SMIL = '<smil><body><video src="{target}"/></body></smil>'
IDX = "# VobSub index file, v7\nsize: 64x64\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n"
# Name -> content. {target} is a film beside it, a file of the system or an address.
LISTS = {
    "list.m3u8": M3U8,
    "list.mp4": M3U8,
    "list.ffconcat": CONCAT,
    "list.txt": CONCAT,
    "list.mkv": CONCAT,
    "list.mpd": MPD,
    "list.avi": KEY,
    "list.sdp": SDP,
    "list.smil": SMIL,
    "list.ram": "{target}\n",
    "list.asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
    "list.pls": "[playlist]\nFile1={target}\nNumberOfEntries=1\n",
}


@pytest.fixture
def listener():
    """An address, and who connected to it."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            try:
                while True:
                    connection, _ = server.accept()
                    calls.append(connection.recv(100))
                    connection.close()
            except OSError:
                return  # the test has ended

        threading.Thread(target=listen, daemon=True).start()
        yield server.getsockname()[1], calls
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def secret(tmp_path):
    """A film that no other file should be able to show."""
    return write_video(tmp_path / "secret.ts", [draw("circle", "red", "blue", (64, 64))], seconds_each=1)


def plainly(source):
    """How many frames FFmpeg shows if it is let."""
    with av.open(source, timeout=5) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("target", ["secret.ts", "{secret}", "file:{secret}", "/etc/passwd", "http", "tcp"])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_films_opens_none(tmp_path, secret, listener, name, target):
    port, calls = listener
    target = f"{target}://127.0.0.1:{port}/a.ts" if target in ("http", "tcp") else target.format(secret=secret)
    file = tmp_path / name
    file.write_text(LISTS[name].replace("{target}", target).replace("{port}", str(port)))
    for source in (str(file), io.BytesIO(file.read_bytes())):
        with pytest.raises(MediaError, match="cannot be read as a video"):
            read_video("video_path", source, Frames())
    assert calls == []


@pytest.mark.parametrize(("name", "content"), [("list.m3u8", M3U8), ("list.txt", CONCAT)])
def test_that_was_no_empty_threat(tmp_path, secret, name, content):
    (tmp_path / name).write_text(content.replace("{target}", "secret.ts"))
    assert plainly(str(tmp_path / name)) == plainly(str(secret)) == 8


def test_a_name_with_a_number_s_place_is_no_row_of_pictures(tmp_path):
    for name in ("a000.png", "a001.png", "a%03d.png"):
        draw("circle", "red", "blue", (64, 64)).save(tmp_path / name)
    assert plainly(str(tmp_path / "a%03d.png")) == 2
    with pytest.raises(MediaError, match="a picture"):
        read_video("video_path", str(tmp_path / "a%03d.png"), Frames())


def test_subtitles_do_not_open_the_film_that_belongs_to_them(tmp_path, secret):
    (tmp_path / "a.idx").write_text(IDX)
    secret.rename(tmp_path / "a.sub")
    with pytest.raises(MediaError):
        read_video("video_path", str(tmp_path / "a.idx"), Frames())


@pytest.mark.parametrize("name", ["concat:a.mp4", "http:a.mp4", "a%03d.mp4", "crypto+file:a.mp4", "ä b,c?d#e|f.mp4"])
def test_whatever_its_name_a_film_is_shown(tmp_path, monkeypatch, name):
    if os.name == "nt":
        name = name.translate(dict.fromkeys(map(ord, ":?|"), "-"))
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4", [draw("circle", "red", "blue", (64, 64))]).rename(tmp_path / name)
    for source in (name, str(tmp_path / name)):
        assert len(read_video("video_path", source, Frames()).frames) > 0


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "ts", "mpg", "flv", "nut", "m4v", "gif", "apng"])
def test_the_kinds_of_films_that_people_have_are_shown(tmp_path, suffix):
    codecs = {
        "gif": ("gif", "rgb8"),
        "apng": ("apng", "rgb24"),
        "mpg": ("mpeg1video", "yuv420p"),
        "flv": ("flv", "yuv420p"),
    }
    codec, pixels = codecs.get(suffix, ("mpeg4", "yuv420p"))
    file = tmp_path / f"film.{suffix}"
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), "red"))))
        container.mux(stream.encode())
    shown = read_video("video_path", str(file), Frames())
    assert np.abs(shown.frames.mean((0, 1, 2)) - [255, 0, 0]).max() < 10


def test_no_kind_of_film_is_one_that_names_others():
    assert not {"hls", "dash", "concat", "sdp", "image2", "rtsp", "lavfi", "vobsub", "imf", "avisynth"} & set(FILMS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_kinds_of_pictures_that_people_have_are_opened_whatever_their_name(tmp_path, kind):
    file = tmp_path / "a.picture"
    draw("circle", "red", "blue").save(file, kind)
    with open_picture(file) as picture:
        assert picture.format == kind
    assert kind in PICTURES


@pytest.mark.skipif(os.name == "nt", reason="a script stands for Ghostscript")
@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_ghostscript_is_never_run(tmp_path, monkeypatch, name):
    """Pillow finds it by its name, the first time that it needs it."""
    from PIL import EpsImagePlugin

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    (tmp_path / "bin" / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    draw("circle", "red", "blue", (64, 64)).save(tmp_path / "a.eps", "EPS")
    (tmp_path / "a.eps").rename(tmp_path / name)
    with pytest.raises(MediaError, match="cannot be read as a picture"):
        pictures({"image": tmp_path / name})
    assert not (tmp_path / "run").exists()
    with pytest.raises(OSError, match=r"."), Image.open(tmp_path / name) as picture:
        picture.load()
    assert (tmp_path / "run").exists(), "it would have been"


def test_a_drawing_that_names_other_files_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>')
    with pytest.raises(MediaError, match="cannot be read as a picture"):
        pictures({"image": tmp_path / "a.png"})


def test_kinds_that_this_pillow_lacks_are_passed_over(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(MediaError, match="cannot identify"):
        pictures({"image": tmp_path / "a.png"})
