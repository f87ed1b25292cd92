"""How is a file opened as a picture? Pillow decodes; what it refuses or reads wrongly is put right here, or refused.

A picture is recognised by its content; its suffix does not matter.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from k5cache.shared.plain import UnfitFile, open_plain, read_plain
from k5cache.sources import jpeg, png, tiff
from k5cache.sources.items import Content, UnreadableImage

MAX_PIXELS = 500_000_000  # 1.5 GB as RGB; the largest photographs have about 250 million
MOST_BYTES = 4 << 30
"""Of a picture's file: more than MAX_PIXELS take, at 16 bits and without compression."""
File = BufferedReader | io.BytesIO
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "JPEG2000")
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AS_PNG = "save it as PNG"
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RGB16 = "RGB;16B"  # Pillow's name for 16 bits of which it keeps the higher byte
_FLAW = "k5cache flaw"  # in ``Image.info``

# Pillow's warnings about metadata (a damaged EXIF tag, a tag with too many values) do not concern the pixels. Its own
# limit of 89 million pixels is below what cameras produce; MAX_PIXELS is checked instead, on every image opened here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


@contextmanager
def open_image(content: Content) -> Iterator[Image.Image]:
    """Open an image without decoding it. Any error while it is open becomes an ``UnreadableImage``."""
    with errors_as_reasons(), stream(content) as file:
        if not file.read(1):
            raise UnreadableImage("is empty (0 bytes)")
        file.seek(0)
        with _open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(too_large(f"{image.width}x{image.height}"))
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                tiff.refuse_what_is_read_wrongly(image)
            yield image


def load(content: Content, image: Image.Image) -> Image.Image:
    """Decode an image that ``open_image`` opened from ``content``. Its size, mode and alpha are then right.

    The orientation is not applied; read it from ``image``.
    """
    if image.format == "JPEG" or image.format == "MPO":
        return _load_jpeg(content, image)
    if image.format == "PNG" and "transparency" in image.info:
        return _load_png_with_key(content, image)
    if image.format == "TIFF" and tiff.is_misread(_as_tiff(image)):
        with Image.open(io.BytesIO(tiff.rewritten(_bytes(content))), formats=("TIFF",)) as again:
            tiff.refuse_what_is_read_wrongly(_as_tiff(again))
            again.load()
            return again
    if image.format == "GIF":
        return _load_gif(image)
    image.load()
    if image.format in ("BMP", "DIB") and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # as in browsers: many programs leave the alpha bytes zero
    if image.format == "JPEG2000" and (profile := _jp2_profile(_bytes(content))):
        image.info["icc_profile"] = profile
    return image


def flaw(content: Content, image: Image.Image) -> str:
    """What is damaged in an image that can be used all the same; "" if nothing is. Decodes only a suspicious file.

    Raises:
        UnreadableImage: pixels are missing.
    """
    if image.format in ("JPEG", "MPO") and _lacks_end(content):
        _load_jpeg(content, image)
    return str(image.info.get(_FLAW, ""))


def decodes_anew(image: Image.Image) -> bool:
    """Whether the pixels of an opened image may differ from what earlier versions of this program made of its file."""
    if image.format == "PNG":
        return "transparency" in image.info and _layout(image) in ("L;2", "L;4", _RGB16)
    if image.format == "TIFF":
        page = _as_tiff(image)
        is_inverted = page.tag_v2.get(tiff.PHOTOMETRIC) == 0 and image.mode.startswith("I")
        return tiff.is_misread(page) or image.mode in ("I", "F") or is_inverted or page.tag_v2.get(tiff.BITS) == (12,)
    if image.format == "GIF":
        return _frame_of(image) != (0, 0, *image.size)
    return image.format in ("BMP", "DIB") and image.mode == "RGBA"


def turn(image: Image.Image, exif: int) -> Image.Image:
    """``image`` upright, given its EXIF ``orientation``."""
    method = _TRANSPOSE.get(exif)
    return image if method is None else image.transpose(method)


def orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 to 8; 1 if there is none, if it is damaged, or if the decoder applies it."""
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    try:
        # The base class's getexif: PNG's own decodes the whole image to look behind the pixels.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # EXIF is a format of its own and can be damaged in as many ways as an image
        return 1


@contextmanager
def errors_as_reasons() -> Iterator[None]:
    """Turn the errors of Pillow and the file system into an ``UnreadableImage`` that a person understands."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnfitFile as error:
        raise UnreadableImage(f"cannot be read: {error.strerror}") from None
    except FileNotFoundError as error:
        raise UnreadableImage("is no longer there") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("is not an image, or is of a kind that is not supported") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(too_large("it")) from error
    except MemoryError as error:
        raise UnreadableImage("needs more memory than is free") from error
    except Exception as error:
        # Pillow's decoders raise nearly any exception on damaged bytes (OSError, SyntaxError, struct.error, ...),
        # and one bad file must not end an encode of thousands.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "MAX_TEXT" in reason:
            reason = f"a text or colour profile in it is too large: {_AS_PNG} without metadata"
        raise UnreadableImage(f"cannot be read ({reason or type(error).__name__})") from error


def stream(content: Content) -> File:
    """The bytes of an image, to be read from the beginning."""
    return io.BytesIO(content) if isinstance(content, bytes) else open_plain(content, MOST_BYTES)


def too_large(subject: str) -> str:
    """The reason for which a picture of more than ``MAX_PIXELS`` is refused."""
    return f"{subject} has more than {MAX_PIXELS // 1_000_000} million pixels"


def _open(file: File) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(32)
        file.seek(0)
        image = _open_otherwise(file, head)
        if image is None:
            raise
        return image


def _open_otherwise(file: File, head: bytes) -> Image.Image | None:
    """Open a file that Pillow alone refuses; None if it is not an image.

    Raises:
        UnreadableImage: it is an image, but cannot be read; the reason says what to do.
    """
    if head.startswith(png.SIGNATURE):
        return _open_damaged_png(file)
    if _is_heif(head):
        return _open_with_plugin(file, "HEIF", "HEIC", ("pillow_heif", "pi_heif"), "pillow-heif")
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return _open_with_plugin(file, "JXL", "JPEG XL", ("pillow_jxl",), "pillow-jxl-plugin")
    if head.startswith(_TIFF) and tiff.is_apart(data := file.read()):
        with suppress(UnidentifiedImageError):
            return Image.open(io.BytesIO(tiff.rewritten(data)), formats=("TIFF",))
    if kind := _kind_without_decoder(head):
        raise UnreadableImage(f"is {kind} that cannot be read: {_AS_PNG}")
    return None


def _open_damaged_png(file: File) -> Image.Image:
    data, damaged = png.without_damage(file.read())
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if damaged:
        image.info[_FLAW] = f"its chunk {' and '.join(damaged)} is damaged and is left out"
    return image


def _open_with_plugin(file: File, name: str, kind: str, modules: tuple[str, ...], package: str) -> Image.Image:
    """Open with a plugin of Pillow that the user may have installed; it is imported for the first such file."""
    for module in modules:
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if name not in Image.OPEN and hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
        return Image.open(file, formats=(name,))
    raise UnreadableImage(f"is {kind}, which needs a plugin: pip install {package}, or {_AS_PNG}")


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _kind_without_decoder(head: bytes) -> str:
    """What a file is, of a kind that this Pillow has no decoder for, or only for some of its variants."""
    if head.startswith(_TIFF):
        return "a TIFF of a kind"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "an AVIF file"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP file"
    if head.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        return "a JPEG 2000 file"
    return ""


def _load_jpeg(content: Content, image: Image.Image) -> Image.Image:
    try:
        image.load()
    except OSError:
        data = _bytes(content)
        whole = jpeg.completed(data) if jpeg.lacks_end(data) else None
        if whole is None:
            raise
        image.info[_FLAW] = "its end marker is missing; every pixel is there"
        with Image.open(io.BytesIO(whole), formats=("JPEG",)) as again:
            again.load()
            return again
    if jpeg.looks_cut(image) and jpeg.lacks_pixels(_bytes(content)):
        raise OSError("image file is truncated, and an end marker was put behind it")
    return image


def _lacks_end(content: Content) -> bool:
    """``jpeg.lacks_end``, which reads the whole file, only where the last bytes do not settle it."""
    with stream(content) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2))
        return file.read() != jpeg.END and jpeg.lacks_end(_bytes(content))


def _load_png_with_key(content: Content, image: Image.Image) -> Image.Image:
    """A PNG with a transparent grey or colour, which the file gives in its own bits and Pillow's pixels no longer have.

    A palette's transparency needs nothing, and neither do 1-bit and 16-bit greys.
    """
    data = _bytes(content)
    key, bits = png.key_colour(data), png.depth(data)
    if image.mode == "RGB" and bits == 8 and len(key) == 3:
        image.info["transparency"] = key
    if image.mode == "L" and len(key) == 1:
        image.info["transparency"] = key[0] * 255 // (2**bits - 1)
    low = None
    if image.mode == "RGB" and bits == 16 and len(key) == 3 and _layout(image) == _RGB16:
        low = _low_bytes(data)
    image.load()
    if low is not None:
        values = np.asarray(image).astype(np.uint16) << 8 | low
        del image.info["transparency"]
        image.putalpha(Image.fromarray(np.where((values == key).all(axis=2), 0, 255).astype(np.uint8)))
    return image


def _low_bytes(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """``[H, W, 3]``: the lower byte of each sample of a 16-bit RGB PNG. Pillow gives the higher ones."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # the other byte order
        return np.asarray(image)


def _load_gif(image: Image.Image) -> Image.Image:
    """The first frame of a GIF. Where it does not cover the canvas there is nothing, so it is transparent there."""
    frame = _frame_of(image)
    image.load()
    if frame == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(frame), frame)
    canvas.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return canvas


def _frame_of(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the first frame of a GIF that is not decoded yet."""
    tiles = _tiles(image)
    return tiles[0].extents or (0, 0, *image.size) if tiles else (0, 0, *image.size)


def _layout(image: Image.Image) -> object:
    """How Pillow will unpack the samples of an image that is not decoded yet: ``L;2``, ``RGB;16B``."""
    tiles = _tiles(image)
    return tiles[0].args if tiles else None


def _tiles(image: Image.Image) -> list[ImageFile._Tile]:
    """What is still to be decoded, and how."""
    return image.tile if isinstance(image, ImageFile.ImageFile) else []


def _jp2_profile(data: bytes) -> bytes:
    """The ICC profile of a JPEG 2000 file, which Pillow does not read; b"" if there is none."""
    at = data.find(b"colr", 0, 4096)
    if at < 4 or data[at + 4 : at + 5] != b"\x02":  # 2: a profile follows
        return b""
    (length,) = struct.unpack_from(">I", data, at - 4)
    return data[at + 7 : at - 4 + length]


def _as_tiff(image: Image.Image) -> TiffImagePlugin.TiffImageFile:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    return image


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else read_plain(content, MOST_BYTES)
