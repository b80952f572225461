"""What is shown of films: as a player shows them, at the size of the budget, each frame with its time."""

import io
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
from films import HEIGHT, WIDTH, number, numbers, turn, write_film
from PIL import Image

from qwenvl.media import packets
from qwenvl.media.films import Video, read_video
from qwenvl.media.media import MediaError, videos
from qwenvl.media.opening import open_film
from qwenvl.media.timeline import read_timeline
from qwenvl.request import Frames, LoadSpec, Request

SPREAD = [0, 13, 25, 38, 51, 64, 76, 89]
TWO_AND_A_HALF = Frames(sample_fps=2.5)


def read(path, frames=TWO_AND_A_HALF, *window) -> Video:
    return read_video("video_path", str(path), frames, *window)


class Socket:
    """ComfyUI's VIDEO, as far as it is used."""

    def __init__(self, source, window):
        self._source, self._window = source, window

    def get_stream_source(self):
        return self._source

    def get_active_trim_window(self):
        return self._window


def socket(source, frames=TWO_AND_A_HALF, window=(0.0, 0.0)) -> Video:
    (video,) = videos(Request(LoadSpec("m"), "?", video=Socket(source, window), frames=frames))
    return video


# Matrix -> what PIL has to do with the stored picture so that it looks as in a player.
MATRICES = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("through", [str, lambda path: io.BytesIO(path.read_bytes())], ids=["path", "bytes"])
def test_a_film_is_turned_and_mirrored_as_a_player_shows_it(tmp_path, matrix, through):
    lying = Image.new("RGB", (96, 64))
    lying.paste("red", (0, 0, 32, 32))
    lying.paste("blue", (64, 0, 96, 32))
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_image(lying)))
        container.mux(stream.encode())
    turn(path, *matrix)
    seen = socket(through(path)).frames[0].astype(int)
    right = np.asarray(lying.transpose(MATRICES[matrix]) if MATRICES[matrix] is not None else lying).astype(int)
    assert seen.shape == right.shape
    # Colours bleed a little at edges.
    assert np.median(np.abs(seen - right)) < 8
    assert np.abs(seen - right).mean() < 8


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (0, 1, 0, 0), (1, 1, -1, 1), (-32768, 32767, 32767, -32768)])
def test_a_matrix_that_is_no_quarter_turn_still_shows_a_film(tmp_path, matrix):
    frames = read(turn(write_film(tmp_path / "a.mp4"), *matrix)).frames
    assert frames.shape[0] == 8
    assert sorted(frames.shape[1:3]) == [HEIGHT, WIDTH]


def test_a_turned_film_keeps_to_the_budget_and_to_the_smallest_side(tmp_path):
    path = turn(write_film(tmp_path / "a.mp4"), 0, 1, -1, 0)
    small = read(path, Frames(max_frame_pixels=3136)).frames.shape[1:3]
    assert small == (
        pytest.approx(56 * (WIDTH / HEIGHT) ** 0.5, abs=1),
        pytest.approx(56 * (HEIGHT / WIDTH) ** 0.5, abs=1),
    )
    assert read(path).frames.shape[1:3] == (WIDTH, HEIGHT)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts", "a.mpg", "a.avi", "a.h264"])
@pytest.mark.parametrize("sar", [Fraction(16, 11), Fraction(8, 9), Fraction(2), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_stretched_in_width(tmp_path, name, sar):
    codec = "mpeg2video" if name.endswith("mpg") else "libx264"
    if codec == "mpeg2video":
        # It knows four shapes of the screen only: 4:3 is the one that is neither that of the pixels nor far from it.
        sar = Fraction(4, 3) / Fraction(WIDTH, HEIGHT)
    video = read(write_film(tmp_path / name, codec, sar=sar))
    assert video.frames.shape[1:3] == (HEIGHT, pytest.approx(WIDTH * sar, abs=1))
    assert numbers(video) == SPREAD


def test_pixels_of_an_impossible_shape_are_taken_for_square_ones(tmp_path):
    video = read(write_film(tmp_path / "a.mkv", sar=Fraction(1000)))
    assert video.frames.shape[1:3] == (HEIGHT, WIDTH)


def test_squeezed_and_turned(tmp_path):
    path = turn(write_film(tmp_path / "a.mp4", sar=Fraction(2)), 0, 1, -1, 0)
    assert read(path).frames.shape[1:3] == (2 * WIDTH, HEIGHT)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (33, 35), (1, 1), (17, 301)])
def test_films_of_odd_and_tiny_sizes(tmp_path, size):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", size, "red"))))
        container.mux(stream.encode())
    frames = read(path).frames
    assert min(frames.shape[1:3]) >= 32
    assert frames.shape[2] / frames.shape[1] == pytest.approx(size[0] / size[1], rel=0.05)
    assert np.abs(frames.mean((0, 1, 2)) - [255, 0, 0]).max() < 10


RECORDING_MS = [*(i * 1000 // 30 for i in range(90)), *(3000 + 5000 * i for i in range(12))]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.mov"])
def test_frames_of_a_variable_rate_are_picked_by_time(tmp_path, name):
    """Three busy seconds and a still minute: each second counts the same."""
    path = write_film(tmp_path / name, total=len(RECORDING_MS), times_ms=RECORDING_MS)
    seen = read(path, Frames())
    assert len(seen.times_s) == 16
    assert sum(time < 3 for time in seen.times_s) <= 4
    assert numbers(seen)[-12:] == list(range(90, 102))
    assert [RECORDING_MS[number] for number in numbers(seen)] == pytest.approx(
        [1000 * seconds for seconds in seen.times_s], abs=1
    )
    few = read(path, Frames(max_frames=8))
    assert [round(time) for time in few.times_s] == [0, 8, 18, 23, 33, 43, 48, 58]


def test_of_a_variable_rate_at_least_four_frames_are_shown_and_an_even_number(tmp_path):
    times = [0, 20, 40, 60, 80, 100, 60_000]
    path = write_film(tmp_path / "a.mp4", total=len(times), times_ms=times)
    assert read(path, Frames()).times_s == pytest.approx([0, 0.02, 0.1, 60], abs=0.041)
    assert len(read(path, Frames(max_frames=2)).times_s) == 2
    assert len(read(path, Frames(max_frames=1)).times_s) == 1
    times = [0, 1000, 20_000, 21_000, 40_000]
    path = write_film(tmp_path / "b.mp4", total=len(times), times_ms=times)
    assert len(read(path, Frames()).times_s) == 4


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.mkv"])
def test_the_last_frame_lasts_as_long_as_the_file_says(tmp_path, name):
    codec, pixels = ("gif", "rgb8") if name == "a.gif" else ("libx264", "yuv420p")
    path = write_film(tmp_path / name, codec, 25, pixels=pixels)
    assert read(path).duration_s == pytest.approx(1.0, abs=0.001)


FILES = ["a.mp4", "a.ts", "a.mkv", "a.flv", "a.avi", "a.h264", "a.m2ts"]


@pytest.mark.parametrize("name", FILES)
def test_a_window_counts_from_the_film_s_start_whatever_the_file_s_clock_says(tmp_path, name):
    path = write_film(tmp_path / name)
    video = socket(str(path), window=(1.0, 2.0))
    assert numbers(video) == [25, 41, 58, 74]
    assert video.times_s == pytest.approx([0, 0.64, 1.32, 1.96])
    assert video.duration_s == pytest.approx(2)
    assert numbers(socket(io.BytesIO(path.read_bytes()), window=(3.0, 0.0))) == [75, 80, 84, 89]


def test_a_still_picture_that_began_before_the_window_is_shown(tmp_path):
    """Slides: what is on the screen when the window begins is seen first."""
    path = write_film(tmp_path / "a.mp4", total=4, times_ms=[0, 10_000, 20_000, 30_000], b_frames=0)
    inside = socket(str(path), Frames(), (12.0, 3.0))
    assert (numbers(inside), inside.times_s, inside.duration_s) == ([1], (0.0,), 3.0)
    late = socket(str(path), Frames(), (15.0, 10.0))
    assert (numbers(late), late.times_s) == ([1, 2], (0.0, pytest.approx(5.0)))
    # At a constant rate, a window begins with the first frame in it, as in ComfyUI.
    assert numbers(socket(str(write_film(tmp_path / "b.mp4")), window=(1.01, 1.0)))[0] == 26


@pytest.mark.parametrize(("name", "start_ms"), [("a.mp4", 2000), ("a.mkv", 2000), ("a.ts", 2000), ("a.mp4", -1200)])
def test_films_that_do_not_start_at_nought(tmp_path, name, start_ms):
    """An edit list takes away what is earlier than that."""
    path = write_film(tmp_path / name, times_ms=[start_ms + 40 * i for i in range(90)])
    cut = max(0, -start_ms // 40)
    video = read(path)
    assert (numbers(video)[0], numbers(video)[-1]) == (cut, 89)
    assert video.times_s[0] == 0
    assert video.times_s[-1] == pytest.approx((89 - cut) * 0.04, abs=0.001)
    assert video.duration_s == pytest.approx((90 - cut) * 0.04, abs=0.001)


def test_a_cancel_is_heard_while_a_film_is_read(tmp_path):
    """While its times are read, and while it is decoded."""
    path, calls = write_film(tmp_path / "a.mp4"), []

    def check(most):
        calls.append(1)
        if len(calls) == most:
            raise KeyboardInterrupt

    for most in (1, 50, 120):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            videos(Request(LoadSpec("m"), "?", video_path=str(path)), lambda most=most: check(most))
        assert len(calls) == most


def write_packets(path, counts):
    """A film of raw frames of 2 x 2 pixels, so many of them in each stream, the last stream first."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("rawvideo", rate=1000) for _ in counts]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 2, 2, "gray"
        for stream, count in reversed(list(zip(streams, counts, strict=True))):
            for number in range(count):
                packet = av.Packet(b"abcd")
                packet.stream, packet.time_base = stream, Fraction(1, 1000)
                packet.pts = packet.dts = number
                container.mux(packet)
    return path


@pytest.mark.parametrize("counts", [(3000,), (4, 3000), (1, 0, 3000)])
def test_a_cancel_is_heard_at_every_packet_however_small_and_of_whatever_stream(tmp_path, counts):
    path, calls = write_packets(tmp_path / "a.nut", counts), []

    def check():
        calls.append(1)
        if len(calls) == 2500:
            raise KeyboardInterrupt

    with open_film(str(path)) as container, pytest.raises(KeyboardInterrupt):
        for _ in packets.packets(container, container.streams[0], check):
            pass
    assert len(calls) == 2500


@pytest.mark.parametrize("counts", [(80,), (20, 60), (20, 10, 50)])
def test_a_film_of_more_packets_than_are_read_is_an_error_that_names_it(tmp_path, counts, monkeypatch):
    path = write_packets(tmp_path / "a.nut", counts)
    monkeypatch.setattr(packets, "MOST_PACKETS", 90)
    assert len(read_timeline("a.nut", str(path), lambda: None).times_s) in counts
    monkeypatch.setattr(packets, "MOST_PACKETS", 79)
    with pytest.raises(MediaError, match=r"a\.nut.* more than 79 packets of pictures and sound: cut it into shorter"):
        read(path)


def test_the_index_of_many_tiny_frames_holds_numbers_only(tmp_path):
    path = write_packets(tmp_path / "a.nut", (50_000,))
    tracemalloc.start()
    found = read_timeline("a.nut", str(path), lambda: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.times_s) == len(found.keys) == 50_000
    assert peak < 50_000 * 120


def test_what_is_no_film_is_an_error_that_names_it(tmp_path):
    with pytest.raises(MediaError, match=r"no frame between 9 and 10 s"):
        socket(str(write_film(tmp_path / "a.mp4")), window=(9.0, 1.0))
    assert number(read(tmp_path / "a.mp4").frames[-1]) == 89
