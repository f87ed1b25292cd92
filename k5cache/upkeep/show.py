"""What will be trained on, as pictures? The cached latents decoded, each with its bucket and its captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, ImageStat
from PIL.PngImagePlugin import PngInfo
from rich.progress import Progress

from k5cache.encode.differences import Difference, refuse_model, table_of
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.errors import OutputError
from k5cache.shared.files import new_file
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.model import ModelConfig
from k5cache.store.index import IndexRow
from k5cache.store.reader import Cache

if TYPE_CHECKING:
    import torch

SOFTWARE = "k5cache show"  # in the PNG: a sheet may be drawn over an older one of the same cache
CELL = 256  # pixels of the longer side of a picture in the sheet
LINES = 4  # of caption under a picture
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf")
"""Looked for on the system, because Pillow's own font has Latin letters only."""


@dataclass(frozen=True)
class Shown:
    """One item as it will be trained on."""

    row: IndexRow
    captions: tuple[str, ...]
    """Cleaned."""
    picture: Image.Image
    mask: Image.Image | None = None
    """Greyscale, one pixel per latent; white counts in a masked loss."""


def write_contact_sheet(
    cache: Cache, out: Path, count: int, model: ModelConfig, device: str, bars: Progress, seed: int = 0
) -> int:
    """Write a contact sheet of ``count`` random items, or all if there are fewer. Returns how many.

    Raises:
        CacheStale: the VAE is not the one that encoded the cache.
        CacheCorrupt: a row is damaged.
    """
    numbers = sorted(random.Random(seed).sample(range(len(cache)), min(count, len(cache))))
    sheet = contact_sheet(decode(cache, numbers, model, device, bars))
    data, note = BytesIO(), PngInfo()
    note.add_text("Software", SOFTWARE)
    sheet.save(data, format="PNG", pnginfo=note)
    with new_file(out) as file:
        file.write(data.getvalue())
    return len(numbers)


def free_default(cache: Path) -> Path:
    """``<CACHE>.png`` beside the cache, unless a picture of someone else has that name.

    Raises:
        OutputError: the file was not drawn here.
    """
    path = cache.resolve().with_name(f"{cache.resolve().name}.png")
    if path.is_file() and not _is_sheet(path):
        raise OutputError(
            f"{path} is there already and was not drawn by k5cache show",
            "Name another file with -o, such as -o sheet.png",
        )
    return path


def _is_sheet(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def decode(cache: Cache, numbers: Sequence[int], model: ModelConfig, device: str, bars: Progress) -> list[Shown]:
    """Decode the posterior's mean of the items at these positions. Raises as ``write_contact_sheet``."""
    import torch

    from k5cache.encoders.vae import load_vae

    folder = model_folder(model, ("vae",))
    cached_vae = table_of(cache.root, cache.manifest.recipe, "latents", "vae")["vae"]
    difference = Difference("latents", "vae", cached_vae, fingerprint(folder, "vae"))
    if difference.cached != difference.now:
        raise refuse_model(cache.root, model.source, [difference], "Name its model with --model DIR")
    device = pick_device(device)
    task = bars.add_task("VAE", total=len(numbers), unit="image", note="")
    vae = load_vae(folder, device, torch.float32)
    shown: list[Shown] = []
    for number in numbers:
        row = cache.row(number)
        # Stored unscaled, as the VAE gives it: decode without scaling_factor.
        mean = cache.latents(row.latent_key)["mean"].float().permute(2, 0, 1).unsqueeze(0).to(device)
        with torch.no_grad():
            picture = to_picture(vae.decode(mean).sample[0])
        mask = Image.fromarray((cache.mask(row.mask_key) * 255).byte().numpy()) if row.mask_key else None
        shown.append(Shown(row, tuple(cache.text(key).caption for key in row.caption_keys), picture, mask))
        bars.advance(task)
    bars.remove_task(task)
    return shown


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """``[3, H, W]`` in [-1, 1] as a picture."""
    rows = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(rows.numpy())


def contact_sheet(shown: Sequence[Shown], columns: int | None = None) -> Image.Image:
    """A grid of pictures, each above its path, bucket and captions."""
    columns = columns or min(len(shown), max(2, round(len(shown) ** 0.5)))
    font, line, gap = load_font(13), 17, 12
    labels = [_labels(item, font) for item in shown]
    cell_height = CELL + line * max(map(len, labels)) + 2 * gap
    num_rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (CELL + gap) + gap, num_rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, item in enumerate(shown):
        left, top = gap + i % columns * (CELL + gap), gap + i // columns * cell_height
        scale = CELL / max(item.picture.size)
        size = (max(1, round(item.picture.width * scale)), max(1, round(item.picture.height * scale)))
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        picture = _under_mask(item).resize(size, method)
        sheet.paste(picture, (left + (CELL - size[0]) // 2, top + CELL - size[1]))
        for number, (text, colour) in enumerate(labels[i]):
            draw.text((left, top + CELL + 4 + number * line), text, colour, font)
    return sheet


def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of the system with many scripts, or Pillow's own, which has Latin letters only."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _under_mask(item: Shown) -> Image.Image:
    """The picture, paler where its mask leaves it out."""
    if item.mask is None:
        return item.picture
    pale = Image.blend(item.picture, Image.new("RGB", item.picture.size, "white"), 0.8)
    return Image.composite(item.picture, pale, item.mask.resize(item.picture.size, Image.Resampling.NEAREST))


def _labels(item: Shown, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[tuple[str, str]]:
    """(text, colour) of each line under a picture."""
    row = item.row
    kind = f"{row.bucket_width}x{row.bucket_height} of {row.width}x{row.height}{', flipped' if row.flipped else ''}"
    kind += f", mask {ImageStat.Stat(item.mask).mean[0] / 255:.0%}" if item.mask else ""
    more = f" (and {len(item.captions) - 1} more)" if len(item.captions) > 1 else ""
    caption = wrap((item.captions[0] or "(empty caption)") + more, font, CELL, LINES)
    return [(_fit(row.path, font), "#666"), (kind, "#06c"), *((text, "black") for text in caption)]


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """``text`` in at most ``most`` lines of at most ``width`` pixels; a longer text ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        pieces = _pieces(word, font, width)
        lines += pieces if lines[-1] else [pieces[0], *pieces[1:]]
        if not lines[0]:
            lines = lines[1:]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-3] + "..."]


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """A word cut into pieces that fit a line: a text in a script without spaces is one word."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _fit(path: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``path``, or its end if all of it is too long."""
    if font.getlength(path) <= CELL:
        return path
    while path and font.getlength("..." + path) > CELL:
        path = path[max(1, len(path) // 20) :]
    return "..." + path
