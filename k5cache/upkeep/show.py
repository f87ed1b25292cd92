"""What will be trained on, as pictures? The cached latents decoded, each with its bucket and its captions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageStat
from PIL.PngImagePlugin import PngInfo
from rich.progress import Progress

from k5cache.encode.differences import Difference, refuse_model, table_of
from k5cache.remote.behind import mirror_of
from k5cache.shared.checkpoint import model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.errors import OutputError
from k5cache.shared.files import new_file
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.fonts import Font, font_for, wrap, write
from k5cache.shared.model import ModelConfig
from k5cache.store.index import IndexRow
from k5cache.store.reader import Cache, no_items

if TYPE_CHECKING:
    import torch

SOFTWARE = "k5cache show"  # in the PNG: a sheet may be drawn over an older one of the same cache
CELL = 256  # pixels of the longer side of a picture in the sheet
LINES = 4  # of caption under a picture
FONT_SIZE = 13


@dataclass(frozen=True)
class Shown:
    """One item as it will be trained on."""

    row: IndexRow
    captions: tuple[str, ...]
    """Cleaned."""
    picture: Image.Image
    mask: Image.Image | None = None
    """Greyscale, one pixel per latent; white counts in a masked loss."""
    source: Image.Image | None = None
    """For image-to-image, the picture before the edit, of the same size."""


def write_contact_sheet(
    cache: Cache, out: Path, count: int, model: ModelConfig, device: str, bars: Progress, seed: int = 0
) -> int:
    """Write a contact sheet of ``count`` random items, or all if there are fewer. Returns how many.

    Raises:
        CacheError: the cache has no item.
        CacheStale: the VAE is not the one that encoded the cache.
        CacheCorrupt: a row is damaged.
    """
    if not len(cache):
        raise no_items(cache)
    numbers = sorted(random.Random(seed).sample(range(len(cache)), min(count, len(cache))))
    sheet = contact_sheet(decode(cache, numbers, model, device, bars))
    data, note = BytesIO(), PngInfo()
    note.add_text("Software", SOFTWARE)
    sheet.save(data, format="PNG", pnginfo=note)
    with new_file(out) as file:
        file.write(data.getvalue())
    return len(numbers)


def free_default(cache: Path) -> Path:
    """``<CACHE>.png`` beside the cache, or here if that is at a URL; unless a picture of someone else has that name.

    Raises:
        OutputError: the file was not drawn here.
    """
    folder = Path.cwd() if mirror_of(cache) else cache.resolve().parent
    path = folder / f"{cache.resolve().name}.png"
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
        picture, *sources = (_decode(vae, cache.latents(key)["mean"].to(device)) for key in row.latent_keys)
        mask = Image.fromarray((cache.mask(row.mask_key) * 255).byte().numpy()) if row.mask_key else None
        captions = tuple(cache.text(key).caption for key in row.caption_keys)
        shown.append(Shown(row, captions, picture, mask, *sources))
        bars.advance(task)
    bars.remove_task(task)
    return shown


def _decode(vae: Any, mean: torch.Tensor) -> Image.Image:
    """The picture of ``[H/8, W/8, 16]``, which is stored unscaled, as the VAE gives it: no ``scaling_factor`` here."""
    import torch

    with torch.no_grad():
        return to_picture(vae.decode(mean.float().permute(2, 0, 1).unsqueeze(0)).sample[0])


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """``[3, H, W]`` in [-1, 1] as a picture."""
    rows = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(rows.numpy())


def contact_sheet(shown: Sequence[Shown], columns: int | None = None) -> Image.Image:
    """A grid of pictures, each above its path, bucket and captions. Sources are on the left of their targets."""
    line, gap = 17, 12
    side_by_side = 2 if any(item.source for item in shown) else 1
    cell_width = side_by_side * CELL + (side_by_side - 1) * gap
    columns = columns or min(len(shown), max(2, round((len(shown) / side_by_side) ** 0.5)))
    labels = [_labels(item, cell_width) for item in shown]
    cell_height = CELL + line * max(map(len, labels)) + 2 * gap
    num_rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, num_rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, item in enumerate(shown):
        left, top = gap + i % columns * (cell_width + gap), gap + i // columns * cell_height
        pictures = (item.source, _under_mask(item)) if item.source else (_under_mask(item),)
        for number, picture in enumerate(map(_fitted, pictures)):
            middle = left + number * (CELL + gap) + (CELL - picture.width) // 2
            sheet.paste(picture, (middle, top + CELL - picture.height))
        for number, (text, colour) in enumerate(labels[i]):
            write(draw, (left, top + CELL + 4 + number * line), [text], colour, font_for(text, FONT_SIZE), line)
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture with its longer side as long as a cell."""
    scale = CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _under_mask(item: Shown) -> Image.Image:
    """The picture, paler where its mask leaves it out."""
    if item.mask is None:
        return item.picture
    pale = Image.blend(item.picture, Image.new("RGB", item.picture.size, "white"), 0.8)
    return Image.composite(item.picture, pale, item.mask.resize(item.picture.size, Image.Resampling.NEAREST))


def _labels(item: Shown, width: int = CELL) -> list[tuple[str, str]]:
    """(text, colour) of each line under a picture."""
    row = item.row
    kind = f"{row.bucket_width}x{row.bucket_height} of {row.width}x{row.height}{', flipped' if row.flipped else ''}"
    kind += f", mask {ImageStat.Stat(item.mask).mean[0] / 255:.0%}" if item.mask else ""
    more = f" (and {len(item.captions) - 1} more)" if len(item.captions) > 1 else ""
    text = (item.captions[0] or "(empty caption)") + more
    caption = wrap(text, font_for(text, FONT_SIZE), width, LINES)
    names = f"{row.source_path} -> {row.path}" if item.source else row.path
    names = _fit(names, font_for(names, FONT_SIZE), width)
    return [(names, "#666"), (kind, "#06c"), *((line, "black") for line in caption)]


def _fit(path: str, font: Font, width: int = CELL) -> str:
    """``path``, or its end if all of it is too long."""
    if font.getlength(path) <= width:
        return path
    while path and font.getlength("..." + path) > width:
        path = path[max(1, len(path) // 20) :]
    return "..." + path
