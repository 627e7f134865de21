"""What every model sees of an image file: turned as EXIF says, on white, 8 bits; no animation."""

import base64
import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from vismem.data.fingerprint import examine_image
from vismem.runtime import images
from vismem.runtime.images import upright
from vismem.runtime.limits import RequestError, check_request

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
TURNS = {  # by EXIF orientation, what a camera that was held otherwise wrote
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_is_turned_as_its_exif_data_says(orientation: int, kind: str) -> None:
    turn, exif = TURNS[orientation], Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = PICTURE if turn is None else PICTURE.transpose(turn)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(stored, kind, exif=exif, **lossless)
    assert opened(data).size == stored.size
    assert upright(opened(data)).tobytes() == PICTURE.tobytes()
    assert examine_image(data).sha256 == examine_image(saved(PICTURE)).sha256, "the same picture to a reader"


def test_odd_data_in_other_tags_is_no_fault_of_a_picture() -> None:
    """Written back, the tags would be an error: Pillow reads what it cannot write."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, (72, 1)
    data = bytearray(saved(PICTURE.transpose(TURNS[6]), exif=exif))  # type: ignore[arg-type]
    tag = data.index(b"\x1a\x01\x05\x00") if b"\x1a\x01\x05\x00" in data else data.index(b"\x01\x1a\x00\x05")
    data[tag + 4 : tag + 8] = b"\x00" * 4  # a rational of no numbers
    chunk = data.index(b"eXIf")
    size = int.from_bytes(data[chunk - 4 : chunk], "big")
    data[chunk + 4 + size : chunk + 8 + size] = zlib.crc32(data[chunk : chunk + 4 + size]).to_bytes(4, "big")
    assert upright(opened(bytes(data))).tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("error", [struct.error("odd"), TypeError("odd"), AssertionError("odd")])
def test_whatever_a_decoder_raises_is_the_image_s_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> Image.Image:
        raise error

    monkeypatch.setattr(images, "upright", fail)
    with pytest.raises(RequestError, match="image 1 of 1 does not decode: odd"):
        images.decoded([PICTURE])


def test_what_is_transparent_is_white_and_what_is_half_so_is_half_white() -> None:
    shown = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    shown.putpixel((1, 0), (200, 0, 0, 0))
    shown.putpixel((2, 0), (200, 0, 0, 128))
    seen = upright(opened(saved(shown)))
    assert [seen.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (255, 255, 255)]
    assert np.allclose(seen.getpixel((2, 0)), (227, 127, 127), atol=1)
    grey = Image.new("LA", (1, 1), (10, 0))
    assert upright(opened(saved(grey))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 0)
    assert upright(opened(saved(palette, transparency=0))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_shades() -> None:
    shades = np.array([[0, 257, 25_700, 65_535]], np.uint16)
    seen = upright(opened(saved(Image.fromarray(shades))))
    assert [seen.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (1, 1, 1), (100, 100, 100), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr"])
def test_any_other_image_is_what_pillow_makes_of_it(mode: str) -> None:
    image = PICTURE.convert(mode)
    assert upright(image).tobytes() == image.convert("RGB").tobytes()
    assert upright(image).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused_and_set_apart(kind: str) -> None:
    data = saved(PICTURE, kind, save_all=True, append_images=[PICTURE.rotate(90), PICTURE.rotate(180)])
    with pytest.raises(RequestError, match="image 1 of 1 is an animation of 3 frames: send one of them"):
        check_request([data], b"what?", 1)
    assert examine_image(data).fault == "an animation of 3 frames, of which a model sees one"
    assert check_request([saved(PICTURE, kind)], b"what?", 1)[0].size == PICTURE.size


def test_a_camera_s_file_of_several_pictures_is_its_first_one() -> None:
    data = saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    assert opened(data).n_frames == 2
    (image,) = check_request([data], b"what?", 1)
    assert upright(image).tobytes() == opened(saved(PICTURE, "JPEG")).tobytes()
    assert examine_image(data).fault is None


def test_the_pixels_of_a_picture_are_limited_as_a_file_s_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vismem.runtime.limits.MAX_IMAGE_PIXELS", 1_499)
    for image in (saved(PICTURE), PICTURE):
        with pytest.raises(RequestError, match="image 1 of 1 has 1500 pixels: the limit is 1499"):
            check_request([image], b"what?", 1)


def test_a_video_behind_a_phone_s_photo_is_not_read() -> None:
    """Among its bytes are those that begin a scan."""
    thumbnail = b"\xff\xe3" + (2 + len(data := saved(PICTURE, "JPEG"))).to_bytes(2, "big") + data  # it ends, too
    photo = data[:2] + thumbnail + data[2:] + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08" * 500
    (image,) = check_request([photo], b"what?", 1)
    assert upright(image).tobytes() == opened(data).tobytes()
    assert examine_image(photo).fault is None


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(before: bytes = b"", behind: bytes = b"") -> bytes:
    """PICTURE's file with more chunks around the picture."""
    data = saved(PICTURE)
    picture, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    return data[:picture] + before + data[picture:end] + behind + data[end:]


TEXT = zlib.compress(("\N{GRINNING FACE}" + "a" * 1_000_000).encode())  # four bytes a character, once it is read
INFLATED = {
    "packed": [chunk(b"iTXt", b"%d\0\1\0\0\0" % number + TEXT) for number in range(4)],
    "packed, Latin": [chunk(b"zTXt", b"%d\0\0" % number + TEXT) for number in range(4)],
    "colour profiles": [chunk(b"iCCP", b"\0\0" + TEXT)] * 4,
    "damaged": [chunk(b"zTXt", b"\0\0" + TEXT[:-1] + b"\0")] * 4,
    "as they are": [chunk(b"tEXt", b"key\0" + bytes(1_000_000))] * 4,
    "EXIF": [chunk(b"eXIf", b"II*\0" + bytes(1_000_000))] * 4,
    "as they are, in Unicode": [chunk(b"iTXt", b"key\0\0\0\0\0" + bytes(1_000_000))] * 4,
}


@pytest.mark.parametrize("kind", INFLATED)
def test_the_texts_of_a_request_take_no_more_than_so_many_bytes(kind: str) -> None:
    """Wherever they stand: Pillow reads those behind the picture when it decodes it."""
    half, first = b"".join(INFLATED[kind][:2]), INFLATED[kind][0]
    check_request([png_with(first)], b"what?", 1)
    for file in (png_with(half * 2), png_with(behind=half * 2), png_with(half, half)):
        with pytest.raises(RequestError, match=r"image 2 of 2 .*: texts and EXIF data take more than 4000000 bytes"):
            check_request([saved(PICTURE), file], b"what?", 1)
        assert "texts and EXIF data take" in str(examine_image(file).fault)
    with pytest.raises(RequestError, match=r"image 3 of 3 .*: with it texts and EXIF data take more"):
        check_request([png_with(first)] * 2 + [png_with(half)], b"what?", 1)


def test_a_file_of_more_parts_than_an_encoder_writes_is_refused() -> None:
    packed = zlib.compress(b"".join(b"\0" + PICTURE.tobytes()[150 * row : 150 * row + 150] for row in range(30)))
    header = saved(PICTURE)[: saved(PICTURE).index(b"IDAT") - 4]
    pieces = b"".join(chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed)))  # some thousands
    (image,) = check_request([header + pieces + chunk(b"IEND")], b"what?", 1)
    assert upright(image).tobytes() == PICTURE.tobytes()
    check_request([png_with(chunk(b"prVt") * 990)], b"what?", 1)
    for file in (header + chunk(b"IDAT") * 10_000 + pieces, png_with(chunk(b"prVt") * 1_000), png_with(behind=TEXTS)):
        with pytest.raises(RequestError, match="a PNG of so many chunks is no picture; save it again"):
            check_request([file], b"what?", 1)


TEXTS = chunk(b"tEXt", b"key\0value") * 1_000
LOOSE = {  # what Pillow reads byte by byte, or table by table, in Python
    "padding": b"\xff" * 20_000,
    "zeros": bytes(20_000),
    "restarts": b"\xff\xd0" * 10_000,
    "an extension, which has no length": b"\xff\xf0\x4e\x20" + bytes(20_000),
    "segments": b"\xff\xe3\0\2" * 1_000,
    "behind an end": b"\xff\xd9" + bytes(20_000),
    "tables": b"\xff\xdb" + (2 + 65 * 300).to_bytes(2, "big") + bytes(65 * 300),
    "resources": b"\xff\xed\x4e\x20Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 1_664 + bytes(16),
}


@pytest.mark.parametrize("kind", LOOSE)
def test_a_jpeg_whose_head_takes_python_s_time_is_refused(kind: str) -> None:
    data = saved(PICTURE, "JPEG")
    head, rest = data[: data.index(b"\xff\xdb")], data[data.index(b"\xff\xdb") :]
    with pytest.raises(RequestError, match="a JPEG of so many segments or scans is no photo; save it again"):
        check_request([head + LOOSE[kind] + rest], b"what?", 1)
    (image,) = check_request([head + bytes(9_000) + rest], b"what?", 1)
    assert upright(image).tobytes() == opened(data).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_data_count_as_texts_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "a" * 50_000
    check_request([photo := saved(PICTURE, kind, exif=exif)] * 60, b"what?", 1)
    monkeypatch.setattr("vismem.runtime.limits.MAX_TEXT_BYTES", 140_000)
    with pytest.raises(RequestError, match=r"image 3 of 60 .*: with it texts and EXIF data take more"):
        check_request([photo] * 60, b"what?", 1)
    assert examine_image(photo).fault is None
    monkeypatch.setattr("vismem.runtime.limits.MAX_TEXT_BYTES", 40_000)
    with pytest.raises(RequestError, match=r"image 1 of 1 .*: texts and EXIF data take more"):
        check_request([photo], b"what?", 1)
    assert "texts and EXIF data take more" in str(examine_image(photo).fault), "as `prepare` and `validate` say"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 11, 12, 13, 24, 25, 35, 36])
def test_base64_in_pieces_is_base64(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes; and an error for a text that is cut, has a wrong character, or padding before its end."""
    monkeypatch.setattr(images, "PIECE", 16)
    text = base64.b64encode(np.random.default_rng(size).bytes(size))
    cut = [text[:end] for end in range(len(text))]
    changed = [
        text[:i] + wrong + text[i + len(wrong) :] for i in range(len(text)) for wrong in (b"=", b"==", b"-", b"\n")
    ]
    for sent in (text, text + b"=", text + b"AAAA", *cut, *changed):
        if re.fullmatch(rb"([\w+/]{4})*([\w+/]{2}==|[\w+/]{3}=)?", sent):
            assert images.from_base64(sent) == images.image_file(sent) == base64.b64decode(sent)
        elif not re.match(rb"([\w+/]{4})*=", sent):  # which Python takes, and ours where no piece ends there
            with pytest.raises(ValueError):  # noqa: PT011 - the decoder's words are its own
                images.from_base64(sent)
            assert images.image_file(sent) == sent
