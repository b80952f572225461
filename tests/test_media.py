from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import draw, image, write_video
from PIL import Image

from qwenvl.media import MediaError, pick_frames, pictures, read_video
from qwenvl.request import Frames

RED, BLUE = (255, 0, 0), (0, 0, 255)


ONE_A_SECOND = Frames()


def read(path, frames=ONE_A_SECOND, **window):
    return read_video("video_path", path, frames, **window)


def corner(picture):
    return picture.getpixel((0, 0))


def test_every_image_of_every_batch_is_seen_in_order():
    red, blue, green = (Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime"))
    found = pictures({"image1": image(red, blue), "image3": image(green)})
    assert [corner(each) for each in found] == [RED, BLUE, (0, 255, 0)]


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
    assert [corner(each) for each in pictures({"image1": tensor})] == [(255, 255, 255), RED]


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
