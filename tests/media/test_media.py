import io
import re
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from pictures import draw, image, write_video
from PIL import Image, features
from video_input import VideoInput

from qwenvl.media.media import MediaError, pick_frames, pictures, read_video, videos
from qwenvl.request import Frames, LoadSpec, Request

RED, BLUE = (255, 0, 0), (0, 0, 255)


ONE_A_SECOND = Frames()


def read(path, frames=ONE_A_SECOND, **window):
    return read_video("video_path", path, frames, **window)


def corner(picture):
    return picture.getpixel((0, 0))


def test_every_image_of_every_batch_is_seen_in_order():
    red, blue, green = (Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime"))
    found = pictures({"image1": image(red, blue), "image3": image(green)})
    assert [corner(entry) for entry in found] == [RED, BLUE, (0, 255, 0)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_gives_the_same_picture(dtype):
    (found,) = pictures({"image1": image(Image.new("RGB", (4, 4), "red")).to(dtype)})
    assert corner(found) == RED


def test_values_outside_the_range_are_clipped():
    tensor = torch.full((1, 4, 4, 3), -0.25)
    tensor[..., 0] = 1.25
    assert corner(pictures({"image1": tensor})[0]) == RED


def test_a_view_that_is_not_contiguous_is_read_right():
    wide = image(Image.new("RGB", (8, 4), "red"))
    wide[:, :, 1::2] = 0
    assert corner(pictures({"image1": wide[:, :, ::2]})[0]) == RED
    assert pictures({"image1": wide.transpose(1, 2)})[0].size == (4, 8)


def test_one_channel_is_gray():
    assert corner(pictures({"image1": torch.full((1, 4, 4, 1), 0.5)})[0]) == (128, 128, 128)


def test_what_is_transparent_becomes_white():
    tensor = torch.zeros(2, 4, 4, 4)
    tensor[..., 0] = 1
    tensor[1, ..., 3] = 1
    assert [corner(picture) for picture in pictures({"image1": tensor})] == [(255, 255, 255), RED]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.full((1, 4, 4, 3), float("nan")), "NaN"),
        (torch.zeros(0, 4, 4, 3), "empty"),
        (torch.zeros(1, 0, 4, 3), "empty"),
        (torch.zeros(1, 4, 4, 5), "shape"),
        (torch.zeros(4, 4), "shape"),
    ],
)
def test_a_bad_image_is_an_error_that_names_the_input(tensor, reason):
    with pytest.raises(MediaError, match=rf"image2.*{reason}"):
        pictures({"image1": torch.zeros(1, 4, 4, 3), "image2": tensor})


def test_a_picture_file_is_turned_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert pictures({"image1": tmp_path / "photo.jpg"})[0].size == (4, 8)


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        with pytest.raises(MediaError, match=name):
            pictures({"image1": tmp_path / name})


def test_a_frame_a_second_with_its_true_time(tmp_path):
    scenes = [draw("circle", color, "white", (64, 64)) for color in ("red", "blue")]
    video = read(str(write_video(tmp_path / "v.mp4", scenes, seconds_each=4, fps=8)))
    assert len(video.frames) == 8
    assert video.duration_s == pytest.approx(8, abs=0.01)
    expected = [round(i) / 8 for i in np.linspace(0, 63, 8)]
    assert video.times_s == pytest.approx(expected)
    middle = video.frames[:, 32, 32].astype(int)
    reds = [pixel[0] > 200 > 100 > pixel[2] for pixel in middle]
    assert reds == [time < 4 for time in video.times_s], "red before blue, and red is channel 0"


def test_a_variable_frame_rate_keeps_its_times(tmp_path):
    path = tmp_path / "vfr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for milliseconds in (0, 100, 200, 3000):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64)))
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read(str(path)).times_s == pytest.approx((0, 0.1, 0.2, 3.0), abs=0.002)


@pytest.mark.parametrize(
    ("total", "duration_s", "count"),
    [(1, 0.1, 1), (2, 0.1, 2), (3, 0.1, 2), (30, 1, 4), (100, 10, 10), (110, 11, 12), (100000, 4000, 64)],
)
def test_frames_are_spread_over_the_whole_video_and_capped(total, duration_s, count):
    picked = pick_frames("video", total, duration_s, (64, 64), Frames())
    assert len(picked) == len(set(picked)) == count
    assert picked == sorted(picked)
    assert picked[0] == 0
    assert picked[-1] == (total - 1 if count > 1 else 0)


def test_large_frames_are_scaled_to_the_pixel_budget(tmp_path):
    path = write_video(tmp_path / "large.mp4", [Image.new("RGB", (1920, 1080))], seconds_each=1, fps=4)
    height, width = read(str(path)).frames.shape[1:3]
    assert height * width <= Frames().max_frame_pixels * 1.01
    assert width / height == pytest.approx(16 / 9, rel=0.01)


def test_a_bad_video_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    for name in ("text.mp4", "empty.mp4", "sound.mkv", "missing.mp4"):
        with pytest.raises(MediaError, match=name):
            read(str(tmp_path / name))
    with pytest.raises(MediaError, match="there is no file"):
        read(str(tmp_path))


def test_a_video_that_was_cut_gives_what_is_there(tmp_path):
    scenes = [draw(shape, color, "white") for color in ("red", "blue", "green") for shape in ("circle", "square")]
    path = write_video(tmp_path / "v.ts", scenes)
    whole = read(str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 4 <= len(read(str(path)).frames) < len(whole.frames)


RED_THEN_BLUE = [draw("circle", color, "white", (64, 64)) for color in ("red", "blue")]


class Stream:
    """ComfyUI's VIDEO, as far as it is used; of an older version without a window."""

    def __init__(self, source, window=None):
        self._source = source
        if window:
            self.get_active_trim_window = lambda: window

    def get_stream_source(self):
        return self._source


def looked_at(**given):
    given = {"load": LoadSpec("any"), "text": "?"} | given
    return videos(Request(**given))


def is_red(frame):
    return bool(frame[32, 32, 0] > 200 > 100 > frame[32, 32, 2])


@pytest.mark.parametrize(("window", "reds"), [((4.0, 0.0), 0), ((0.0, 3.5), 4), ((2.0, 4.0), 2), (None, 4)])
def test_of_a_trimmed_video_only_its_window_is_seen(tmp_path, window, reds):
    path = str(write_video(tmp_path / "v.mp4", RED_THEN_BLUE, seconds_each=4, fps=8))
    (video,) = looked_at(video=Stream(path, window))
    seen = [is_red(frame) for frame in video.frames]
    assert seen == [True] * reds + [False] * (len(seen) - reds)
    assert video.times_s[0] == 0, "times count from the start of the window"
    assert video.duration_s == pytest.approx((window or (0, 8))[1] or 4, abs=0.01)


def test_a_window_that_holds_no_frame_is_an_error(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", RED_THEN_BLUE, 1))
    with pytest.raises(MediaError, match=r"video: .*v\.mp4.* holds no frame between 9 and inf s"):
        looked_at(video=Stream(path, (9.0, 0.0)))


def test_a_video_in_memory_is_read_without_moving_its_place(tmp_path):
    content = io.BytesIO(write_video(tmp_path / "v.mp4", RED_THEN_BLUE, 1).read_bytes())
    content.seek(5)
    for _ in "ab":
        (video,) = looked_at(video=Stream(content))
        assert [is_red(frame) for frame in video.frames] == [True, True, False, False]
    assert content.tell() == 5


class Components(VideoInput):
    def get_components(self):
        frames = image(*[RED_THEN_BLUE[0]] * 20, *[RED_THEN_BLUE[1]] * 20)
        return SimpleNamespace(images=frames, frame_rate=Fraction(5), audio=None)


class FromFile(VideoInput):
    def __init__(self, path):
        self.get_stream_source_of = path

    def get_components(self):
        raise AssertionError("all frames would be decoded")

    def get_stream_source(self):
        return self.get_stream_source_of


class Inherited(FromFile):
    """Somebody else's."""


def test_of_a_video_that_is_in_memory_no_file_is_made():
    (video,) = looked_at(video=Components())
    assert [is_red(frame) for frame in video.frames] == [True] * 4 + [False] * 4
    assert video.duration_s == 8


@pytest.mark.parametrize("kind", [FromFile, Inherited])
def test_a_video_that_is_a_file_is_never_decoded_whole(tmp_path, kind):
    path = str(write_video(tmp_path / "v.mp4", RED_THEN_BLUE, 4))
    (video,) = looked_at(video=kind(path))
    assert [is_red(frame) for frame in video.frames] == [True] * 4 + [False] * 4


def test_what_is_no_video_is_refused_with_what_to_do():
    with pytest.raises(MediaError, match=r"video must be a VIDEO, got Tensor\. An IMAGE batch goes into video_frames"):
        looked_at(video=torch.zeros(2, 4, 4, 3))
    with pytest.raises(MediaError, match="video: the video cannot be read"):
        looked_at(video=Stream(io.BytesIO(b"no video")))
    with pytest.raises(MediaError, match="video_frames must have the shape"):
        looked_at(video_frames=torch.zeros(4, 4, 3))


def test_a_batch_of_images_is_a_video_of_that_speed():
    batch = image(*[RED_THEN_BLUE[0]] * 20, *[RED_THEN_BLUE[1]] * 20)
    (video,) = looked_at(video_frames=batch, frames=Frames(fps=5))
    assert [is_red(frame) for frame in video.frames] == [True] * 4 + [False] * 4
    assert video.times_s == pytest.approx([round(i) / 5 for i in np.linspace(0, 39, 8)])
    assert video.duration_s == 8


def test_only_the_frames_that_are_shown_are_converted():
    batch = torch.full((40, 64, 64, 3), float("nan"))
    batch[[0, 13, 26, 39]] = 0.5
    (video,) = looked_at(video_frames=batch, frames=Frames(fps=24))
    assert len(video.frames) == 4


def test_videos_come_in_the_order_frames_stream_path(tmp_path):
    paths = [str(write_video(tmp_path / f"{n}.mp4", [RED_THEN_BLUE[n]], 1)) for n in (0, 1)]
    green = image(*[draw("circle", "lime", "white", (64, 64))] * 4)
    found = looked_at(video_path=paths[1], video=Stream(paths[0]), video_frames=green)
    assert [int(video.frames[0, 32, 32].argmax()) for video in found] == [1, 0, 2]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 20),
        ({"sample_fps": 2.0}, 40),
        ({"sample_fps": 0.1}, 4),
        ({"max_frames": 6}, 6),
        ({"max_frames": 7}, 6),
        ({"max_frames": 1}, 1),
        ({"max_frames": 2, "sample_fps": 5.0}, 2),
    ],
)
def test_how_many_frames_are_seen_can_be_set(settings, count):
    picked = pick_frames("video", 500, 20.0, (64, 64), Frames(**settings))
    assert len(picked) == count
    assert picked[0] == 0


def test_frames_are_thinned_to_the_token_budget_and_the_log_says_so(caplog):
    size = (1280, 720)
    frames = Frames(sample_fps=4, max_frames=500)
    picked = pick_frames("video", 5000, 100.0, size, frames)
    # 8,192 tokens are 64 frames of 256 tokens' size, two frames a token.
    assert len(picked) == 64
    assert caplog.messages == ["[QwenVL] video: 64 frames instead of 400, for at most 8192 tokens"]
    caplog.clear()
    assert len(pick_frames("video", 5000, 100.0, size, replace(frames, max_video_tokens=100_000))) == 400
    assert len(pick_frames("video", 5000, 100.0, (28, 28), frames)) == 400, "small frames cost little"
    assert caplog.messages == []


@pytest.mark.parametrize(("count", "pixels"), [(4, 768 * 784), (16, 768 * 784), (32, 512 * 784), (64, 256 * 784)])
def test_many_frames_are_made_smaller_before_they_are_thinned(tmp_path, count, pixels):
    batch = torch.zeros(1, 640, 1000, 3).expand(count, -1, -1, -1)
    (video,) = looked_at(video_frames=batch, frames=Frames(fps=1))
    shown, height, width, _ = video.frames.shape
    assert shown == count
    assert height * width == pytest.approx(pixels, rel=0.01)


def test_several_videos_share_the_token_budget(tmp_path):
    path = str(write_video(tmp_path / "v.mp4", [Image.new("RGB", (640, 480))], 40, fps=2))
    batch = torch.zeros(1, 480, 640, 3).expand(40, -1, -1, -1)
    found = looked_at(video_frames=batch, video_path=path, frames=Frames(fps=1))
    tokens = sum(video.frames.size / 3 / 784 / 2 for video in found)
    assert tokens == pytest.approx(8192, rel=0.02)


def test_a_picture_that_is_too_narrow_for_the_model_is_refused_by_name():
    with pytest.raises(MediaError, match=r"image1 is 2 x 900 pixels.*at most 200 times"):
        pictures({"image1": Image.new("RGB", (2, 900))})


def damaged(kind):
    """A picture whose header is sound: what is wrong with it shows when it is decoded."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(file, kind)
    content = file.getvalue()
    if kind == "PNG":
        first = content.index(b"IDAT") + 4
        return content[:first] + content[first:].replace(b"IDAT", b"\xab\r\x15\xcc", 1)
    return content[: len(content) - len(content) // 4]


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_a_damaged_picture_of_which_nothing_can_be_seen_is_an_error_that_names_it(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / "damaged"
    path.write_bytes(damaged(kind))
    with pytest.raises(MediaError, match=r"image2: .*damaged.* cannot be read as a picture"):
        pictures({"image2": path})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_of_other_damaged_pictures_the_rest_is_shown_and_the_log_says_so(tmp_path, kind, caplog):
    path = tmp_path / "damaged"
    path.write_bytes(damaged(kind))
    (shown,) = pictures({"image2": path})
    assert np.asarray(shown)[:200].std() > 20
    (told,) = caplog.messages
    assert re.search(r"image2: .*damaged' is damaged \(.*\): .* missing", told)


def test_a_stream_of_frames_without_a_size_is_no_video(tmp_path):
    """Found by fuzzing: a stream whose codec is unknown has no size at all."""
    path = write_video(tmp_path / "v.mkv", RED_THEN_BLUE, 1)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_MPEX4/ISO/ASP"))
    with pytest.raises(MediaError, match="frames of 0 x 0 pixels, or of an unknown codec"):
        read(str(path))


def test_a_film_whose_header_claims_huge_frames_is_refused_before_one_is_decoded(tmp_path):
    """Found by fuzzing: 108 bytes took 4 GB."""
    path = tmp_path / "v.gif"
    path.write_bytes(b"GIF89a ::::::::::::::::::::::::::::::::IF89a2\xd7" + b"\xff" * 5 + b"\x0b\x99\0" + b":" * 60)
    with pytest.raises(MediaError, match=r"frames of \d{5} x \d{5} pixels"):
        read(str(path))


def test_frames_too_narrow_for_the_model_are_refused_by_name():
    with pytest.raises(MediaError, match=r"video_frames is 900 x 2 pixels.*at most 200 times"):
        looked_at(video_frames=torch.zeros(4, 2, 900, 3))


@pytest.mark.parametrize("image", ["/etc/passwd", None, 5, torch.zeros(1, 2, 2, 3, dtype=torch.complex64)])
def test_what_is_no_image_of_numbers_is_refused_by_name(image):
    with pytest.raises(MediaError, match="video_frames must"):
        looked_at(video_frames=image if image is not None else object())


def test_small_frames_are_enlarged_and_keep_their_shape():
    """Older processors of Qwen3-VL refuse a side below 32."""
    (video,) = videos(Request(LoadSpec("m"), "", video_frames=torch.zeros(4, 8, 16, 3)))
    assert video.frames.shape[1:3] == (32, 64)


@pytest.mark.parametrize("name", ["images", "video_frames"])
def test_a_cancel_is_heard_before_every_picture_of_a_batch(name):
    looks, batch = [], torch.rand(9, 32, 32, 3)

    def check():
        looks.append(1)
        if len(looks) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if name == "images":
            pictures({"image1": batch}, check)
        else:
            videos(Request(LoadSpec("m"), "?", video_frames=batch), check)
    assert len(looks) == 4
