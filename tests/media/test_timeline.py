"""Which frames of a film are read, whatever its container, its damage and its clock."""

import io
import re
import tracemalloc

import av
import numpy as np
import pytest
from films import numbers, write_film

from qwenvl.media import timeline
from qwenvl.media.films import read_video
from qwenvl.media.opening import MediaError
from qwenvl.media.packets import Decoder
from qwenvl.media.timeline import _clock, read_timeline
from qwenvl.request import Frames

SPREAD = [0, 13, 25, 38, 51, 64, 76, 89]
LONG = [0, 128, 257, 385, 514, 642, 771, 899]

# Name -> what it is written with.
CONTAINERS = {
    "a.mp4": ("libx264", {}),
    "a.mov": ("libx264", {}),
    "a.mkv": ("libx264", {}),
    "a.avi": ("libx264", {}),
    "a.ts": ("libx264", {}),
    "a.m2ts": ("libx264", {}),
    "a.flv": ("libx264", {}),
    "open_gop.mp4": ("libx264", {"options": {"x264-params": "open-gop=1"}}),
    "open_gop.ts": ("libx264", {"options": {"x264-params": "open-gop=1"}}),
    "pyramid.ts": ("libx264", {"b_frames": 8, "options": {"x264-params": "b-pyramid=normal:b-adapt=0"}}),
    "one_gop.ts": ("libx264", {"gop": 250}),
    "two.mp4": ("libx264", {"gop": 2}),
    "two.ts": ("libx264", {"gop": 2}),
    "refresh.ts": ("libx264", {"gop": 30, "b_frames": 0, "options": {"x264-params": "intra-refresh=1"}}),
    "raw.h264": ("libx264", {}),
    "raw.hevc": ("libx265", {}),
    "hevc.mp4": ("libx265", {}),
    "hevc.ts": ("libx265", {}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4.mp4": ("mpeg4", {}),
    "raw.m4v": ("mpeg4", {}),
    "mpeg2.mpg": ("mpeg2video", {}),
    "mpeg2.ts": ("mpeg2video", {}),
    "mpeg2.mxf": ("mpeg2video", {}),
    "raw.m2v": ("mpeg2video", {"kind": "mpeg2video"}),
    "vp8.webm": ("libvpx", {"b_frames": 0}),
    "vp9.webm": ("libvpx-vp9", {"b_frames": 0}),
    "a.gif": ("gif", {"pixels": "rgb8"}),
    "a.apng": ("apng", {"pixels": "rgb24"}),
    "a.nut": ("ffv1", {}),
    "a.y4m": ("wrapped_avframe", {"kind": "yuv4mpegpipe"}),
}
SEEKABLE = ("a.mp4", "a.mov", "a.mkv", "open_gop.mp4", "two.mp4", "hevc.mp4", "mpeg4.mp4", "vp9.webm")


def read(source, frames, *window):
    return read_video("video_path", source if isinstance(source, io.BytesIO) else str(source), frames, *window)


def needs(codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg writes no {codec}")


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_frames_that_are_shown_are_those_that_were_asked_for(tmp_path, name):
    codec, given = CONTAINERS[name]
    needs(codec)
    path = write_film(tmp_path / name, codec, **given)
    for source in (path, io.BytesIO(path.read_bytes())):
        video = read(source, Frames(sample_fps=2.5))
        assert numbers(video) == SPREAD
        assert video.times_s == pytest.approx([number / 25 for number in SPREAD], abs=0.001)
        assert video.duration_s == pytest.approx(3.6, abs=0.001)


@pytest.fixture(scope="module")
def long_films(tmp_path_factory):
    """Name -> 36 seconds of film."""
    folder = tmp_path_factory.mktemp("long")
    skipped = ("a.gif", "a.apng", "a.y4m", "a.nut")
    return {
        name: write_film(folder / name, codec, 900, **given)
        for name, (codec, given) in CONTAINERS.items()
        if name not in skipped and codec in av.codecs_available
    }


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("a.gif", "a.apng", "a.y4m", "a.nut")])
def test_the_same_of_a_film_so_long_that_its_frames_are_sought(long_films, name):
    needs(CONTAINERS[name][0])
    video = read(long_films[name], Frames(max_frames=8))
    assert numbers(video) == LONG
    assert video.times_s == pytest.approx([number / 25 for number in LONG], abs=0.001)
    assert numbers(read(long_films[name], Frames(), 30.0, 4.0)) == [750, 783, 816, 849]


@pytest.mark.parametrize("name", SEEKABLE)
def test_little_is_decoded_of_a_long_film_that_can_be_sought_in(long_films, name, monkeypatch):
    needs(CONTAINERS[name][0])
    fed, real = [], Decoder._decoded

    def counted(decoder, packet):
        fed.append(packet)
        return real(decoder, packet)

    monkeypatch.setattr(Decoder, "_decoded", counted)
    assert numbers(read(long_films[name], Frames(max_frames=8))) == LONG
    # One group of pictures of 12, and what the decoder holds back; VP9 has a key frame a second or so.
    assert len(fed) < 8 * 60


def test_few_frames_are_held_at_a_time(long_films):
    """900 frames of 30 KB."""
    tracemalloc.start()
    try:
        read(long_films["one_gop.ts"], Frames(max_frames=4))
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


DAMAGED = ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi", "raw.h264", "hevc.mp4", "mpeg4.mp4", "mpeg4.avi", "mpeg2.mpg"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_packet_that_cannot_be_decoded_costs_itself(tmp_path, name, caplog):
    codec, given = CONTAINERS[name]
    needs(codec)
    video = read(write_film(tmp_path / name, codec, broken=(30, 52), **given), Frames(sample_fps=2.5))
    # What is between the damage and the next key frame may show traces of it.
    # And MPEG-PS tells the times of some frames only.
    sound = [number for number in numbers(video) if not 28 <= number < 61]
    assert sound == pytest.approx([0, 13, 25, 64, 76, 89], abs=name == "mpeg2.mpg")
    assert video.duration_s == pytest.approx(3.6, abs=0.1)
    (told,) = caplog.messages
    lost = int(re.search(r"is damaged: (\d+) of its frames could not be decoded", told).group(1))
    # Some decoders leave out as well what needs the damaged frame.
    assert lost == 2 if "a." in name else 2 <= lost <= 10


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
@pytest.mark.parametrize("broken", [(0,), (89,), (88, 89), (0, 1, 2)])
def test_damage_at_the_ends_of_a_film(tmp_path, name, broken, caplog):
    video = read(write_film(tmp_path / name, gop=6, broken=broken), Frames(sample_fps=2.5))
    assert set(SPREAD[2:-1]) <= set(numbers(video))
    assert max(numbers(video)) >= 83
    assert list(video.times_s) == sorted(set(video.times_s))
    assert "is damaged" in caplog.text


def test_damage_in_a_long_film_is_found_while_it_is_sought_in(tmp_path, caplog):
    path = write_film(tmp_path / "a.mp4", total=900, broken=(250, 500, 520))
    video = read(path, Frames(max_frames=8))
    assert [number for number in numbers(video) if not 250 <= number <= 270] == [n for n in LONG if n != 257]
    assert "frames could not be decoded" in caplog.text


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.avi", "raw.h264"])
def test_a_film_of_which_nothing_can_be_decoded_is_an_error(tmp_path, name):
    with pytest.raises(MediaError, match=rf"{name}.*(no frame of it could be decoded|frames of 0 x 0)"):
        read(write_film(tmp_path / name, broken=range(90)), Frames())


def test_an_undamaged_film_is_not_called_damaged(long_films, caplog):
    for name, path in long_films.items():
        if name != "refresh.ts":
            read(path, Frames(max_frames=8))
    assert [message for message in caplog.messages if "damaged" in message] == []


@pytest.mark.parametrize("parts", [2, 3])
def test_recordings_that_were_joined_go_on(tmp_path, parts):
    """Each begins at its own nought again."""
    content = write_film(tmp_path / "a.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(content * parts)
    video = read(tmp_path / "joined.ts", Frames(max_frames=8))
    assert video.duration_s == pytest.approx(3.6 * parts, abs=0.3)
    total = 90 * parts
    assert numbers(video) == pytest.approx([round(i) % 90 for i in np.linspace(0, total - 1, 8)], abs=2)


def test_recordings_whose_clock_was_set_back_are_shown_in_their_order(tmp_path):
    late = write_film(tmp_path / "late.ts", times_ms=[50_000 + 40 * i for i in range(90)]).read_bytes()
    early = write_film(tmp_path / "early.ts", total=40).read_bytes()
    (tmp_path / "joined.ts").write_bytes(late + early)
    video = read(tmp_path / "joined.ts", Frames(max_frames=4))
    assert numbers(video) == pytest.approx([0, 43, 86, 39], abs=2)
    assert video.duration_s == pytest.approx(5.2, abs=0.3)


def test_frames_that_are_lost_one_after_the_other_have_one_in_their_place(tmp_path):
    """Without its key frame, nothing of the first group of pictures can be decoded."""
    video = read(write_film(tmp_path / "a.mp4", broken=(0,)), Frames(sample_fps=5))
    assert numbers(video)[:3] == [12, 16, 21]


def test_a_recording_that_begins_within_a_group_of_pictures(tmp_path):
    content = write_film(tmp_path / "a.ts", gop=25).read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[188 * (len(content) // 188 // 3) :])
    video = read(tmp_path / "cut.ts", Frames())
    assert 20 < numbers(video)[0] <= 50
    assert numbers(video)[-1] == 89
    steps = np.diff(numbers(video)) / 25
    assert np.diff(video.times_s) == pytest.approx(steps, abs=0.001)


@pytest.mark.parametrize(("name", "rate"), [("a.h264", 50), ("a.hevc", 50), ("a.m2v", 50), ("a.h264", 12)])
def test_a_stream_without_times_is_counted_at_its_rate(tmp_path, name, rate, caplog):
    codec = {"a.h264": "libx264", "a.hevc": "libx265", "a.m2v": "mpeg2video"}[name]
    needs(codec)
    kind = "mpeg2video" if name == "a.m2v" else None
    video = read(write_film(tmp_path / name, codec, rate=rate, kind=kind), Frames())
    assert video.duration_s == pytest.approx(90 / rate)
    assert video.times_s == pytest.approx([number / rate for number in numbers(video)])
    assert caplog.messages == []


def test_a_stream_that_does_not_know_its_rate_is_taken_for_one_of_25(tmp_path, caplog):
    needs("libx265")
    options = {"x265-params": "log-level=0:vui-timing-info=0"}
    video = read(write_film(tmp_path / "a.hevc", "libx265", rate=50, options=options), Frames())
    assert video.duration_s == pytest.approx(3.6)
    (told,) = caplog.messages
    assert "a.hevc' does not say how fast it is played: 25 frames a second are assumed" in told


def test_the_times_of_frames_without_a_sound_clock():
    unknown = float("nan")

    def clock(stamps, lost=None, longest=float("inf")):
        return _clock(stamps, lost or [0] * len(stamps), 0.5, longest).tolist()

    assert clock([unknown] * 3) == [0, 0.5, 1]
    assert clock([unknown] * 3, [0, 1, 1]) == [0, 1, 1.5], "a lost frame has its time, too"
    assert clock([7.0] * 3) == [0, 0.5, 1]
    assert clock([3.0, unknown, 4.0]) == [0, 0.5, 1]
    assert clock([1.0, 2.0, 1.5, 3.0]) == [0, 0.5, 1, 2], "out of order"
    assert clock([5.0, 5.5, 0.0, 0.5]) == [0, 0.5, 1, 1.5], "begins anew"
    assert clock([0.0, 0.5, 90.0, 90.5], longest=10) == [0, 0.5, 1, 1.5]
    assert clock([0.0, 0.5, 90.0, 90.5]) == [0, 0.5, 90, 90.5]
    assert clock([0.0, 0.5, 1.0, 1.0, 2.0, 2.5]) == [0, 0.5, 1, 1.5, 2, 2.5], "a time stamp that is another frame's"
    assert clock([]) == []


def test_a_seek_that_lands_too_late_is_noticed(tmp_path, monkeypatch):
    """As containers that seek by another clock than that of the frames do."""
    path = write_film(tmp_path / "a.mp4", total=900)
    real = read_timeline

    def late(*given):
        found = real(*given)
        return timeline.Timeline(
            found.times_s, found.end_s, found.origin_s, found.places, [(key, key + 12_800) for key, _ in found.keys]
        )

    monkeypatch.setattr("qwenvl.media.films.read_timeline", late)
    assert numbers(read(path, Frames(max_frames=8))) == LONG
