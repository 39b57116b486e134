"""Pictures, looked at and decoded, wherever their bytes come from."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from dgm_core.config import Strict
from dgm_core.contract import DataMismatch
from dgm_core.data.sources.base import Plan, refuse

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
_GREY = {"1", "L", "LA", "La"}
_ORIENTATION = 0x0112  # EXIF: 5 … 8 lie on their side


class PictureOptions(Strict):
    """How pictures of any size and mode become arrays of one shape."""

    size: int | tuple[int, int] | None = Field(None, description="height and width; None: as they are, if all agree")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; None: as they are, if all agree")
    fit: Literal["crop", "stretch"] = Field("crop", description="crop: fill the frame, cut the middle out")
    max_pixels: int = Field(50_000_000, gt=0, le=150_000_000, description="larger pictures are refused, unopened")

    def frame(self) -> tuple[int, int] | None:
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Item(NamedTuple):
    """One picture: its name for messages, and its bytes or where they are."""

    name: str
    data: bytes | str


class Look(NamedTuple):
    """What a header says."""

    name: str
    height: int = 0
    width: int = 0
    mode: str = ""
    problem: str | None = None


def look(item: Item, options: PictureOptions, deep: bool) -> Look:
    """Read the header, and with `deep` the pixels."""
    try:
        with _opened(item, options) as image:
            height, width = image.height, image.width
            if image.getexif().get(_ORIENTATION, 1) >= 5:
                height, width = width, height
            if deep:
                image.load()
            return Look(item.name, height, width, image.mode)
    except DataMismatch as problem:
        return Look(item.name, problem=str(problem))
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        return Look(item.name, problem=_unreadable(item, error))


def decode(items: Sequence[Item], shape: tuple[int, ...], options: PictureOptions) -> np.ndarray:
    """(N, C, H, W) uint8; every picture that cannot be read is named."""
    result, problems = np.empty((len(items), *shape), np.uint8), []
    for row, item in enumerate(items):
        try:
            with _opened(item, options) as image:
                result[row] = _array(image, shape, options)
        except DataMismatch as problem:
            problems.append(str(problem))
        except Exception as error:  # as above
            problems.append(_unreadable(item, error))
    refuse(problems)
    return result


def settle(looks: Sequence[Look], options: PictureOptions, plan: Plan) -> tuple[int, int, int] | None:
    """The one shape all pictures will have; what stands in its way goes to the plan's problems."""
    plan.problems += [found.problem for found in looks if found.problem]
    good = [found for found in looks if not found.problem]
    if not good:
        return None
    sizes, colours = defaultdict(list), defaultdict(list)
    for found in good:
        sizes[found.height, found.width].append(found.name)
        colours["grey" if found.mode in _GREY or found.mode.startswith("I;16") else "colour"].append(found.name)
    plan.lines += ["sizes (height × width): " + _told({f"{h}×{w}": names for (h, w), names in sizes.items()})]
    plan.lines += ["modes: " + _told(colours)]
    frame, channels = options.frame(), options.channels
    if frame is None and len(sizes) > 1:
        told = _told({f"{h}×{w}": names for (h, w), names in sizes.items()}, examples=True)
        plan.problems.append(f"pictures have {len(sizes)} sizes: {told}; give `size`")
    if channels is None and len(colours) > 1:
        told = _told(colours, examples=True)
        plan.problems.append(f"grey among colour: {told}; give `channels: 3` or `channels: 1`")
    height, width = frame or (good[0].height, good[0].width)
    return channels or (1 if "grey" in colours else 3), height, width


def _told(groups: dict[str, list[str]], examples: bool = False) -> str:
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    told = [f"{key} in {len(names)}" + (f" (e.g. {names[0]})" if examples else "") for key, names in ranked[:5]]
    return ", ".join(told) + (f", and {len(ranked) - 5} others" if len(ranked) > 5 else "")


def _opened(item: Item, options: PictureOptions) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
        try:
            image = Image.open(item.data if isinstance(item.data, str) else io.BytesIO(item.data))
        except Image.DecompressionBombError as error:
            raise DataMismatch(_bomb(item, "too many", options)) from error
    if image.width * image.height > options.max_pixels:
        image.close()
        raise DataMismatch(_bomb(item, f"{image.width}×{image.height}", options))
    if image.mode in ("I", "F"):
        image.close()
        raise DataMismatch(
            f"{item.name}: pixels of 32 bits have no agreed range; save it with 8 or 16 bits, or use npz"
        )
    return image


def _bomb(item: Item, pixels: str, options: PictureOptions) -> str:
    return (
        f"{item.name} has {pixels} pixels, above max_pixels = {options.max_pixels} (a decompression bomb?); remove it, "
        "scale it down, or raise `max_pixels`"
    )


def _unreadable(item: Item, error: Exception) -> str:
    return f"{item.name} cannot be read as a picture ({type(error).__name__}: {error}); replace or remove it"


def _array(image: Image.Image, shape: tuple[int, ...], options: PictureOptions) -> np.ndarray:
    channels, height, width = shape
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if options.size is None:
            raise DataMismatch(f"a picture of {image.height}×{image.width} came among those of {height}×{width}")
        if options.fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        else:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
