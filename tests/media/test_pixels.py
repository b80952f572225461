import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvl.media.media import MediaError, pictures


def seen(picture, tmp_path=None, kind="PNG"):
    """The pixels that the model is shown, of a file if there is a place for one: (height, width, 3)."""
    if tmp_path is None:
        return np.asarray(pictures({"image1": picture})[0])
    file = tmp_path / f"a.{kind.lower()}"
    if isinstance(picture, bytes):
        file.write_bytes(picture)
    else:
        picture.save(file, kind)
    return np.asarray(pictures({"image1": file})[0])


def grey(pixels):
    """The one channel of a picture without colour."""
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def as_png(kind, depth, size, content, transparent=b""):
    """A PNG by hand: Pillow writes only some of what others do."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    clear = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + clear + chunk(b"IDAT", zlib.compress(b"\0" + content)) + chunk(b"IEND", b"")


def as_tiff(values, bits, photometric=1, sample_format=None):
    """A TIFF of one line of values, given as its bytes."""
    data, count = values
    tags = [(256, 4, count), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, None)]
    tags += [(277, 3, 1), (278, 4, 1), (279, 4, len(data))]
    if sample_format:
        tags.append((339, 3, sample_format))
    start = 8 + 2 + 12 * len(tags) + 4
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, kind, value in tags:
        head += struct.pack("<HHII", tag, kind, 1, start if value is None else value)
    return head + struct.pack("<I", 0) + data


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_by_its_range(tmp_path, kind):
    picture = Image.fromarray(np.array([[0, 257, 0x2000, 0xE000, 65535]], np.uint16))
    assert grey(seen(picture, tmp_path, kind)) == [[0, 1, 32, 223, 255]]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_in_any_order_of_its_bytes(mode):
    values = np.array([[0, 0x2000, 0xE000, 65535]], ">u2" if mode == "I;16B" else "<u2")
    assert grey(seen(Image.frombytes(mode, (4, 1), values.tobytes()))) == [[0, 32, 223, 255]]


def test_a_large_depth_map_keeps_its_shape_and_is_turned_as_its_file_says(tmp_path):
    values = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)
    picture = Image.fromarray(values)
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(tmp_path / "a.png", exif=exif)
    (shown,) = pictures({"image1": tmp_path / "a.png"})
    assert np.abs(np.asarray(shown)[::-1, ::-1, 0].astype(float) - values / 257).max() <= 0.5


def test_a_tiff_in_which_0_is_white_and_one_of_12_bits(tmp_path):
    sixteen = np.array([0, 0x2000, 65535], "<u2")
    assert grey(seen(as_tiff((sixteen.tobytes(), 3), 16, photometric=0), tmp_path, "TIFF")) == [[255, 223, 0]]
    twelve = (bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]), 4)  # 4095, 0, 2048, 0
    assert grey(seen(as_tiff(twelve, 12), tmp_path, "TIFF")) == [[255, 0, 128, 0]]


@pytest.mark.parametrize(
    ("values", "shown", "told"),
    [
        ([0, 0x2000, 65535], [0, 32, 255], ""),
        ([0, 100_000, 200_000], [0, 128, 255], "numbers from 0 to 200000"),
        ([-100, 0, 100], [0, 128, 255], "numbers from -100 to 100"),
        ([70_000, 70_000, 70_000], [0, 0, 0], "numbers from 70000 to 70000"),
    ],
)
def test_whole_numbers_of_32_bits_are_16_bits_where_they_fit_and_else_stretched(tmp_path, caplog, values, shown, told):
    picture = Image.fromarray(np.array([values], np.int32))
    for where in (None, tmp_path):
        caplog.clear()
        assert grey(seen(picture, where, "TIFF")) == [shown]
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert [told in entry for entry in warned] == ([True] if told else [])


def test_numbers_of_32_bits_without_a_sign_are_none_below_zero(tmp_path):
    values = np.array([0, 1 << 31, (1 << 32) - 1], "<u4")
    assert grey(seen(as_tiff((values.tobytes(), 3), 32, sample_format=1), tmp_path, "TIFF")) == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("values", "shown", "told"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255], ""),
        ([0.25, 0.5, 0.75], [64, 128, 191], ""),
        ([-0.001, 0.5, 1.004], [0, 128, 255], ""),
        ([0.0, 127.5, 255.0], [0, 128, 255], "numbers from 0 to 255"),
        ([-1.0, 0.0, 1.0], [0, 128, 255], "numbers from -1 to 1"),
        ([1e-30, 3e38, 1.5e38], [0, 255, 128], "numbers from 1e-30 to 3e+38"),
        ([float("nan"), 0.5, 1.0], [128, 128, 255], "1 of its numbers are NaN or infinite"),
        ([float("inf"), 0.0, 8.0], [0, 0, 255], "1 of its numbers are NaN or infinite"),
    ],
)
def test_fractions_are_0_to_1_where_they_fit_and_else_stretched(tmp_path, caplog, values, shown, told):
    picture = Image.fromarray(np.array([values], np.float32))
    for where in (None, tmp_path):
        caplog.clear()
        assert grey(seen(picture, where, "TIFF")) == [shown]
        assert any(told in message for message in caplog.messages) if told else caplog.messages == []


def test_a_picture_without_one_number_is_an_error_that_names_it(tmp_path):
    picture = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    for where in (None, tmp_path):
        with pytest.raises(MediaError, match=r"image1.*no number in it is finite"):
            seen(picture, where, "TIFF")


RED, BLUE = (254, 0, 0), (0, 0, 254)


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P", "LAB"])
def test_colours_of_any_mode_are_the_same_colours(mode):
    picture = Image.new("RGB", (8, 8), RED)
    picture.paste(BLUE, (4, 0, 8, 8))
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        other = ImageCms.profileToProfile(picture, srgb, lab, outputMode="LAB")
    else:
        other = picture.convert(mode)
    shown = seen(other).astype(int)
    assert np.abs(shown - np.asarray(picture)).max() <= (24 if mode == "LAB" else 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "RGBA", "RGBa", "La"])
def test_grey_of_any_mode_is_the_same_grey(mode):
    picture = Image.new("L", (8, 8), 255)
    picture.paste(0, (4, 0, 8, 8))
    between = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, mode)
    other = picture.convert(between).convert(mode)
    assert grey(seen(other)) == np.asarray(picture).tolist()


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "RGBa", "La", "P", "L"])
def test_what_is_transparent_is_white_in_every_mode(tmp_path, mode):
    """Half of it is black, and half of it black and transparent."""
    rgba = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (4, 0, 8, 8))
    if mode in ("P", "L"):
        picture = Image.new(mode, (8, 8), 0)
        picture.paste(1, (4, 0, 8, 8))
        if mode == "P":
            picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.info["transparency"] = 1
    elif mode == "PA":
        picture = Image.merge("PA", (Image.new("P", (8, 8)), rgba.getchannel("A")))
        picture.putpalette([0, 0, 0])
    else:
        picture = rgba.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    shown = seen(picture)
    assert (shown[:, :4].max(), shown[:, 4:].min()) == (0, 255)


def test_a_colour_or_a_grey_that_a_png_of_16_bits_calls_transparent_is_white(tmp_path):
    clear = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    content = clear + struct.pack(">3H", 0, 0x8000, 0xFFFF)
    assert seen(as_png(2, 16, (2, 1), content, clear), tmp_path).tolist() == [[[255] * 3, [0, 128, 255]]]
    content, clear = struct.pack(">2H", 0x1234, 0x8000), struct.pack(">H", 0x1234)
    assert grey(seen(as_png(0, 16, (2, 1), content, clear), tmp_path)) == [[255, 128]]


def test_colour_of_16_bits_and_grey_with_alpha_of_16_bits(tmp_path):
    assert seen(as_png(2, 16, (1, 1), struct.pack(">3H", 0, 0x8000, 0xFFFF)), tmp_path).tolist() == [[[0, 128, 255]]]
    assert grey(seen(as_png(4, 16, (2, 1), struct.pack(">4H", 0, 0xFFFF, 0, 0)), tmp_path)) == [[0, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_pictures_that_move_the_first_is_shown(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    file = tmp_path / "a"
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert seen(file.read_bytes(), tmp_path, kind).min() > 250


@pytest.mark.parametrize(
    ("tensor", "shown", "told"),
    [
        (torch.tensor([0, 128, 255], dtype=torch.uint8), [0, 128, 255], ""),
        (torch.tensor([False, True]), [0, 255], ""),
        (torch.tensor([-0.25, 0.5, 1.25]), [0, 128, 255], ""),
        (torch.tensor([0.0, 128.0, 255.0]), [0, 255, 255], "values from 0 to 255, where 0 to 1 is expected"),
        (torch.tensor([-1.0, 0.0, 1.0]), [0, 0, 255], "values from -1 to 1, where 0 to 1 is expected"),
        (torch.tensor([float("-inf"), 0.5, float("inf")]), [0, 128, 255], "values from -inf to inf"),
    ],
)
def test_a_tensor_of_another_range_is_read_right_or_told_of(caplog, tensor, shown, told):
    assert grey(seen(tensor.reshape(1, 1, -1, 1))) == [shown]
    assert [told in message for message in caplog.messages] == ([True] if told else [])


def test_a_picture_in_memory_is_not_changed():
    values = np.array([[0, 1, 2]], np.uint16)
    picture = Image.fromarray(values)
    picture.info["transparency"] = 1
    assert grey(seen(picture)) == [[0, 255, 0]]
    assert (np.asarray(picture) == values).all()
    rgb = Image.new("RGB", (2, 1))
    rgb.info["transparency"] = (0, 0, 0)
    assert seen(rgb).min() == 255
    assert rgb.getpixel((0, 0)) == (0, 0, 0)
