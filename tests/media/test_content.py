import numpy as np
import pytest
import torch
from pictures import draw
from PIL import Image

from qwenvl.media.content import TensorPicture, TensorVideo, fingerprint, outlines, with_frames
from qwenvl.media.films import Video
from qwenvl.media.media import MediaError, shown_pictures, shown_videos, videos
from qwenvl.request import Frames, LoadSpec, Request

NOISE = torch.rand(1, 12, 8, 3, generator=torch.Generator().manual_seed(0))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool)


def of_tensor(tensor):
    return fingerprint(shown_pictures({"image1": tensor}), ())


def of_batch(frames, **how):
    return fingerprint((), shown_videos(Request(LoadSpec("m"), "?", video_frames=frames, frames=Frames(**how))))


def of_film(frames, times_s=(0.0, 1.0), duration_s=2.0):
    return fingerprint((), [Video(frames, times_s, duration_s)])


def as_type(tensor, dtype):
    return (tensor * 255 if dtype == torch.uint8 else tensor.round() if dtype == torch.bool else tensor).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_value_makes_another_picture_of_any_type(dtype, channels):
    picture = as_type(torch.rand(1, 6, 5, channels), dtype)
    other = picture.clone()
    other[0, 5, 4, channels - 1] = not other[0, 5, 4, channels - 1]
    assert of_tensor(picture) == of_tensor(picture.clone()) != of_tensor(other)


def test_one_value_makes_another_film():
    frames = torch.rand(4, 6, 5, 3)
    other = frames.clone()
    other[3, 5, 4, 2] += 0.01
    assert of_batch(frames) == of_batch(frames.clone()) != of_batch(other)
    pixels = np.zeros((2, 6, 5, 3), np.uint8)
    changed = pixels.copy()
    changed[1, 5, 4, 2] = 1
    assert of_film(pixels) == of_film(pixels.copy()) != of_film(changed)


def test_one_pixel_makes_another_picture_of_pillow():
    picture = draw("circle", "red", "blue")
    other = picture.copy()
    other.putpixel((191, 191), (0, 0, 254))
    assert fingerprint([picture], ()) == fingerprint([picture.copy()], ()) != fingerprint([other], ())


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[:, 2:10, 1:7],
        lambda whole: whole[:, ::2, ::2],
        lambda whole: whole.flip(1),
        lambda whole: whole[..., :1].expand(-1, -1, -1, 3),
        lambda whole: whole[:, :, :, [2, 1, 0]],
    ],
    ids=["cut out", "every second", "upside down", "expanded", "other channels"],
)
def test_a_part_of_a_tensor_is_the_picture_that_it_shows(view):
    """Not the memory around it."""
    assert of_tensor(view(NOISE)) == of_tensor(view(NOISE).contiguous()) != of_tensor(NOISE)


def test_a_picture_that_lies_channels_first_is_none_of_the_same_memory():
    turned = NOISE.reshape(1, 3, 12, 8).permute(0, 2, 3, 1)
    assert turned.shape == NOISE.shape
    assert turned.data_ptr() == NOISE.data_ptr()
    assert of_tensor(turned) != of_tensor(NOISE)
    assert of_tensor(turned) == of_tensor(turned.clone(memory_format=torch.preserve_format))
    other = turned.clone()
    other[0, 3, 2, 1] += 0.01
    assert of_tensor(other) != of_tensor(turned)


@pytest.mark.parametrize("lies", [NOISE[0], NOISE.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)[0]])
def test_the_memory_of_a_picture_is_hashed_where_it_lies(lies):
    *_, memory = TensorPicture("image1", lies).content()
    assert memory.ctypes.data == lies.data_ptr()
    assert memory.nbytes == lies.nbytes


def test_the_frames_of_a_film_are_hashed_where_they_lie(monkeypatch):
    seen = []

    class Hash:
        def update(self, part):
            seen.append(part)

        def hexdigest(self):
            return ""

    monkeypatch.setattr("qwenvl.media.content.hashlib.new", lambda *_: Hash())
    monkeypatch.setattr("qwenvl.media.content._fastest_hash", lambda: "sha256")
    frames = np.zeros((2, 6, 5, 3), np.uint8)
    of_film(frames)
    assert any(np.shares_memory(part, frames) for part in seen if isinstance(part, np.ndarray))
    frames = np.zeros((2, 6, 10, 3), np.uint8)[:, :, ::2]
    of_film(frames)
    assert len(seen[-1].tobytes()) == frames.nbytes


def test_what_has_the_same_bytes_in_another_shape_order_or_time_is_something_else():
    flat, half = torch.zeros(1, 2, 8, 3), torch.zeros(1, 4, 4, 3)
    one, two = (draw(shape, "red", "blue") for shape in ("circle", "square"))
    frames = np.zeros((2, 2, 8, 3), np.uint8)
    found = [
        *map(of_tensor, (flat, half, flat.half(), torch.zeros(2, 2, 8, 3), flat.to(torch.uint8))),
        *(fingerprint(some, ()) for some in ([], [one], [one, two], [two, one], [one, one])),
        fingerprint([Image.new("RGB", (2, 8))], ()),
        fingerprint([Image.new("RGB", (8, 2))], ()),
        *(of_film(*film) for film in ((frames,), (frames, (0.0, 1.5)), (frames, (0.0, 1.0), 2.5))),
        of_film(frames.reshape(2, 8, 2, 3)),
        of_batch(torch.zeros(2, 2, 8, 3)),
        of_batch(torch.zeros(2, 2, 16, 3)),
        # Of these the same frames are shown, at other times or in another size.
        *(
            of_batch(torch.zeros(8, 256, 256, 3), **how)
            for how in ({"fps": 8}, {"fps": 4}, {"max_frame_pixels": 12544})
        ),
    ]
    assert len(set(found)) == len(found)
    assert {len(each) for each in found} <= {64, 128}, "a hash that nobody can find another content for"


def test_frames_are_converted_when_they_are_needed_and_once(monkeypatch):
    (film,) = shown_videos(Request(LoadSpec("m"), "?", video_frames=torch.rand(8, 40, 36, 3)))
    assert isinstance(film, TensorVideo)
    (expected,) = videos(Request(LoadSpec("m"), "?", video_frames=torch.zeros(8, 40, 36, 3)))
    (outline,) = outlines([film])
    assert outline.frames.shape == film.shape == expected.frames.shape
    assert (outline.times_s, outline.duration_s) == (expected.times_s, expected.duration_s)
    assert outline.frames.base.nbytes == 1
    assert with_frames(film) is with_frames(film)


def test_what_holds_nan_is_found_when_it_is_converted():
    broken = torch.full((4, 40, 36, 3), float("nan"))
    (picture, *_) = shown_pictures({"image2": broken})
    with pytest.raises(MediaError, match="image2 holds NaN"):
        picture.rgb()
    (film,) = shown_videos(Request(LoadSpec("m"), "?", video_frames=broken))
    with pytest.raises(MediaError, match="video_frames holds NaN"):
        with_frames(film)


def test_a_cancel_is_heard_before_every_frame_is_converted_and_hashed():
    calls = []
    (film,) = shown_videos(Request(LoadSpec("m"), "?", video_frames=torch.rand(8, 40, 36, 3)), lambda: calls.append(1))
    count = film.shape[0]
    calls.clear()
    fingerprint((), [film])
    assert len(calls) == count
    with_frames(film)
    assert len(calls) == 2 * count
