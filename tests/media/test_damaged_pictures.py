"""Files that are damaged, or hold more than Pillow reads: what ComfyUI shows of them is shown."""

import re
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from qwenvl.media import opening
from qwenvl.media.media import MediaError, pictures
from qwenvl.media.opening import open_picture
from qwenvl.process import PROCESS


def with_text(tmp_path, **text):
    """A PNG of noise with these texts in it; True as a text's end asks for one that is packed."""
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_text(key, value, zip=key.startswith("packed"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(tmp_path / "a.png", pnginfo=info)
    return picture, tmp_path / "a.png"


def shown(file):
    (picture,) = pictures({"image1": file})
    return picture


def test_text_that_is_too_long_for_pillow_costs_nothing_of_the_picture(tmp_path, caplog):
    for text in (
        {"packed": "x" * 3_000_000},
        {f"packed{number}": "x" * 1_000_000 for number in range(70)},
        {"long": "x" * 70_000_000},
    ):
        picture, file = with_text(tmp_path, **text)
        caplog.clear()
        assert shown(file).tobytes() == picture.tobytes()
        assert [
            re.search(r"text or a colour profile in .*a\.png' cannot be read", message) for message in caplog.messages
        ]
        with open_picture(file) as opened:
            assert opened.size == (64, 64), "as the folder node asks, before it reads"


def test_a_colour_profile_of_megabytes_costs_nothing_of_the_picture(tmp_path, caplog):
    picture, file = with_text(tmp_path)
    picture.save(file, icc_profile=bytes(5_000_000))
    assert shown(file).tobytes() == picture.tobytes()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
def test_a_bad_checksum_of_what_is_not_seen_costs_nothing_of_the_picture(tmp_path, caplog, kind, behind):
    picture, file = with_text(tmp_path)
    content = file.read_bytes()
    chunk = struct.pack(">I", 9) + kind + b"key\0value" + b"\1\2\3\4"
    place = content.index(b"IEND" if behind else b"IDAT") - 4
    file.write_bytes(content[:place] + chunk + content[place:])
    assert shown(file).tobytes() == picture.tobytes()
    # Behind the pixels Pillow looks at some checksums only.
    assert len(caplog.messages) == 1 or behind


def test_beside_a_text_that_is_too_long_a_picture_is_still_turned_and_transparent(tmp_path):
    picture = Image.new("RGBA", (8, 4))
    exif, info = picture.getexif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    info.add_text("packed", "x" * 3_000_000, zip=True)
    picture.save(tmp_path / "a.png", exif=exif, pnginfo=info)
    assert (shown(tmp_path / "a.png").size, shown(tmp_path / "a.png").getpixel((0, 0))) == ((4, 8), (255, 255, 255))
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    picture.save(tmp_path / "a.png", pnginfo=info)
    assert shown(tmp_path / "a.png").size == (4, 8)


def as_comfyui_reads_it(file):
    """node_helpers.pillow of ComfyUI, and what LoadImage does with it."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB").tobytes()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_of_a_file_that_was_cut_off_is_shown_what_comfyui_shows(tmp_path, caplog, kind, share, progressive):
    picture, file = with_text(tmp_path)
    picture.resize((256, 256)).save(file, kind, progressive=progressive)
    whole = len(file.read_bytes())
    file.write_bytes(file.read_bytes()[: whole - max(2, int(whole * share))])
    try:
        expected = as_comfyui_reads_it(file)
    except (OSError, SyntaxError):
        with pytest.raises(MediaError):
            shown(file)
    else:
        assert shown(file).tobytes() == expected
        # The last bytes of a PNG hold nothing.
        assert len(caplog.messages) == (0 if kind == "PNG" and share < 0.1 else 1)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_log_says_how_much_is_missing(tmp_path, caplog):
    picture, file = with_text(tmp_path)
    picture.resize((256, 256)).save(file, "PNG")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shown(file)
    (told,) = caplog.messages
    assert abs(int(re.search(r"the last (\d+) of its 256 lines are missing", told)[1]) - 128) < 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_header_without_pixels_is_no_picture(tmp_path, kind):
    picture, file = with_text(tmp_path)
    picture.save(file, kind)
    content = file.read_bytes()
    pixels = content.index(b"IDAT") + 8 if kind == "PNG" else content.index(b"\xff\xda") + 14
    file.write_bytes(content[:pixels])
    with pytest.raises(MediaError, match="cannot be read as a picture"):
        shown(file)


def test_a_damaged_note_of_how_it_is_turned_costs_only_that(tmp_path, caplog):
    picture, file = with_text(tmp_path)
    picture.save(file, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\2broken")
    assert shown(file).size == (64, 64)
    picture.save(file, exif=b"Exif\0\0no exif at all")
    assert shown(file).tobytes() == picture.tobytes()
    assert all("turned" in message for message in caplog.messages)


def test_no_bomb_goes_off_for_being_damaged(tmp_path, monkeypatch):
    _, file = with_text(tmp_path, packed="x" * 3_000_000)
    monkeypatch.setattr(opening, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(MediaError, match="64 x 64 pixels, too many"):
        shown(file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(MediaError, match="64 x 64 pixels, too many"):
        shown(file)


def test_while_a_damaged_file_is_read_no_other_of_ours_is(tmp_path, monkeypatch):
    """Pillow's switch holds for every thread: a second damaged file would be shown without a word."""
    picture, file = with_text(tmp_path)
    picture.resize((256, 256)).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-1000])
    states, real = [], opening._loaded
    monkeypatch.setattr(opening, "_loaded", lambda *given: states.append(PROCESS.pillow._users) or real(*given))
    with ThreadPoolExecutor(4) as readers:
        list(readers.map(shown, [file] * 40))
    assert states.count(0) == 40, "once for each, and alone"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
