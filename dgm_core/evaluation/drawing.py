"""Pictures out of arrays, as PNG bytes that depend on nothing but their input: no dates, no versions, no state.

Charts are matplotlib's, imported where one is drawn: half a second that training and most processes never need.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgm_core.contract import DataSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

TILE = 64  # pixels that a picture's longer side is enlarged to, by whole factors
GAP = 2
PAPER, LINE = 255, 208
FRAME_MS = 80  # that a frame of an animation stands
FILM_MS = 400  # that a picture of a film stands
HEADING = 32  # height of a line of text above a block of pictures
WAVE, SPECTRUM = (32, 160), 64  # height and width of a drawn recording, and the height of its spectrogram

LOUDER = 8.0

Display = Callable[[Tensor], Tensor]  # stored data -> uint8 pictures (B, C, H, W), or waveforms (B, T) in [−1, 1]


def pictures(x: Tensor, spec: DataSpec, display: Display | None = None) -> UInt8[Tensor, " B 3 H W"]:
    """Images as they are; codes in colours; recordings as a waveform above a spectrogram.

    Without `display`, integer levels are spread over black … white, and real values from the smallest to the largest.
    """
    if spec.kind == "codes":
        x = x.cpu() if x.ndim == 3 else x.cpu()[:, None]
        return coloured(x.double() / max(1, (spec.levels or 2) - 1))
    if spec.kind == "audio":
        return recordings(waveforms(x, spec, display))
    shown = display(x) if display else (_spread(x, spec) * 255).round().to(torch.uint8)
    shown = shown.cpu()
    return shown if shown.shape[1] == 3 else shown.float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)


def coloured(x: Float[Tensor, " B H W"], name: str = "viridis") -> UInt8[Tensor, " B 3 H W"]:
    """Numbers in [0, 1] by a colour map."""
    import matplotlib

    rgba = matplotlib.colormaps[name](x.double().clamp(0, 1).numpy(), bytes=True)
    return torch.from_numpy(np.ascontiguousarray(rgba[..., :3])).movedim(-1, 1)


def waveforms(x: Tensor, spec: DataSpec, display: Display | None = None) -> Float[Tensor, " B T"]:
    """Recordings as stored, to be drawn or played: in [−1, 1]."""
    return display(x) if display else _spread(x, spec) * 2 - 1


def recordings(x: Float[Tensor, " B T"]) -> UInt8[Tensor, " B 3 H W"]:
    """The envelope of each waveform above its log-magnitude spectrogram (60 dB), each on its own scale.

    But envelopes are enlarged by `LOUDER` times those of the loudest at most: what is all but silent looks it.
    """
    x = x.cpu().float()
    height, width = WAVE
    size = min(256, 2 ** int(math.log2(max(4, x.shape[1]))))
    hop = max(1, min(size // 4, x.shape[1] // width))
    spectrum = torch.stft(x, size, hop, window=torch.hann_window(size), return_complex=True).abs()
    level = 20 * torch.log10(spectrum.clamp_min(1e-8))
    level = (level - level.amax((1, 2), keepdim=True)) / 60 + 1
    level = F.interpolate(level[:, None].flip(2), size=(SPECTRUM, width), mode="bilinear", antialias=True)[:, 0]
    peak = x.abs().amax(1, keepdim=True)
    x = x / torch.maximum(peak, peak.max() / LOUDER).clamp_min(1e-8)
    columns = F.interpolate(x[:, None], size=width * math.ceil(x.shape[1] / width), mode="nearest").unflatten(
        2, (width, -1)
    )
    top, bottom = columns.amax(3), columns.amin(3)  # (B, 1, W)
    y = torch.linspace(1, -1, height)[:, None]
    half = 1 / height
    inside = (y <= top + half) & (y >= bottom - half)
    wave = torch.where(inside[:, None], torch.tensor([31, 119, 180])[:, None, None], PAPER).to(torch.uint8)
    return torch.cat([wave, coloured(level, "magma")], 2)


def grid(shown: UInt8[Tensor, " N 3 H W"], columns: int, headed: bool = False) -> bytes:
    """Pictures in rows of `columns`, enlarged by whole pixels; `headed` sets the first column apart."""
    return png(_sheet(shown, columns, headed))


def blocks(panels: Sequence[tuple[str, UInt8[Tensor, " N 3 H W"]]], columns: int) -> bytes:
    """Grids one below the other, each under its name."""
    font, parts = ImageFont.load_default(HEADING // 2), []
    for name, shown in panels:
        sheet = _sheet(shown, columns)
        heading = Image.new("RGB", (sheet.shape[1], HEADING), (PAPER,) * 3)
        ImageDraw.Draw(heading).text((2 * GAP, HEADING / 2), name, "black", font, anchor="lm")
        parts += [np.asarray(heading), sheet]
    return png(np.concatenate(parts))


def _sheet(shown: UInt8[Tensor, " N 3 H W"], columns: int, headed: bool = False) -> np.ndarray[Any, Any]:
    n, _, height, width = shown.shape
    factor = max(1, TILE // max(height, width))
    shown = shown.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width, rows = height * factor, width * factor, -(-n // columns)
    apart = 4 * GAP if headed else 0
    sheet = torch.full((3, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP + apart), LINE, dtype=torch.uint8)
    for i in range(n):
        row, column = divmod(i, columns)
        y, x = GAP + row * (height + GAP), GAP + column * (width + GAP) + (apart if column else 0)
        sheet[:, y : y + height, x : x + width] = shown[i]
    return sheet.movedim(0, 2).numpy()


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """(H, W, 3) uint8 -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def animation(shown: UInt8[Tensor, " rows steps 3 H W"], columns: int) -> bytes:
    """Rows side by side, moving from step to step, over and over: a GIF of at most 256 colours in all."""
    frames = [_sheet(shown[:, i], columns) for i in range(shown.shape[1])]
    return _gif(frames, FRAME_MS)


def film(pictures: Sequence[tuple[str, bytes]]) -> bytes:
    """PNGs of one size, one after the other, each under its name: a GIF that stays on the last for a while."""
    frames, font = [], ImageFont.load_default(HEADING // 2)
    for name, content in pictures:
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        heading = Image.new("RGB", (picture.shape[1], HEADING), (PAPER,) * 3)
        ImageDraw.Draw(heading).text((2 * GAP, HEADING / 2), name, "black", font, anchor="lm")
        frames.append(np.concatenate([np.asarray(heading), picture]))
    return _gif(frames, [FILM_MS] * (len(frames) - 1) + [5 * FILM_MS])


def _gif(frames: Sequence[np.ndarray[Any, Any]], milliseconds: int | list[int]) -> bytes:
    """(H, W, 3) uint8 each, over and over. The palette is common to all, so that nothing flickers."""
    every = Image.fromarray(np.concatenate(frames))
    palette = every.quantize(256, Image.Quantize.MEDIANCUT)
    first, *rest = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0, optimize=False)
    return buffer.getvalue()


def plot(draw: Callable[[Any], None], width: float = 6.0, height: float = 3.5) -> bytes:
    """Let `draw` fill a matplotlib figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    draw(canvas)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def bars(panels: Sequence[tuple[str, Tensor]], xlabel: str, ylabel: str, mark: float | None = None) -> bytes:
    """One bar chart a panel; `mark` draws a level across."""
    from matplotlib.ticker import MaxNLocator

    def draw(canvas: Any) -> None:
        for axes, (title, heights) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.bar(range(len(heights)), heights.double().numpy(), width=1.0 if len(heights) > 40 else 0.8)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if mark is not None:
                axes.axhline(mark, color="black", linewidth=0.8, linestyle="--")

    return plot(draw, width=max(5.0, 4.0 * len(panels)))


def heat_map(values: Float[Tensor, " H W"], name: str) -> bytes:
    """Numbers from zero up, with a bar that says which colour is how much of what `name` says."""
    height, width = values.shape

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        image = axes.imshow(values.numpy(), cmap="viridis", vmin=0, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        canvas.colorbar(image, ax=axes, label=name)

    return plot(draw, width=4.5, height=max(1.5, min(3.6 * height / width, 8.0)))


class Panel(NamedTuple):
    """Points on a plane whose axes have names."""

    title: str
    across: str
    up: str
    points: Float[Tensor, " n 2"]


def coloured_points(panels: Sequence[Panel], labels: Int[Tensor, " n"] | None, names: Sequence[str]) -> bytes:
    """Side by side, a colour a class: up to twenty have a legend, more have a bar."""
    import matplotlib

    few = len(names) <= 20
    table = matplotlib.colormaps[("tab10" if len(names) <= 10 else "tab20") if few else "viridis"]
    last = 10 * (1 + (len(names) > 10)) - 1 if few else len(names) - 1  # the colour that the map ends with

    def draw(canvas: Any) -> None:
        every = canvas.subplots(1, len(panels), squeeze=False)[0]
        for panel, axes in zip(panels, every, strict=True):
            colours = {} if labels is None else {"c": labels.numpy(), "cmap": table, "vmin": 0, "vmax": last}
            x, y = panel.points.numpy().T
            axes.scatter(x, y, s=min(30, max(6, 6000 / len(x))), linewidths=0, alpha=0.7, **colours)
            axes.set(title=panel.title, xlabel=panel.across, ylabel=panel.up)
        if labels is not None and few:
            shown = [every[-1].scatter([], [], s=30, color=table(k / last)) for k in range(len(names))]
            canvas.legend(shown, names, loc="outside right center", frameon=False)
        elif labels is not None:
            canvas.colorbar(every[-1].collections[-1], ax=every[-1], label="class")

    return plot(draw, width=4.2 * len(panels) + 0.9 * (labels is not None), height=4.0)


def scatters(
    panels: Sequence[tuple[str, Tensor]],
    box: tuple[float, float, float, float],
    heats: Sequence[tuple[str, Float[Tensor, " side side"]]] = (),
) -> bytes:
    """Densities in [0, 1] as heat, and points on the plane, all in one frame (left, right, bottom, top): four panels in
    two rows, otherwise side by side."""
    count = len(heats) + len(panels)
    columns = 2 if count == 4 else count
    rows = count // columns
    left, right, bottom, top = box
    tall = min(max((top - bottom) / (right - left), 0.4), 1.6)

    def draw(canvas: Any) -> None:
        every = canvas.subplots(rows, columns, squeeze=False).ravel()
        for (title, heat), axes in zip(heats, every, strict=False):
            axes.imshow(heat.numpy(), extent=box, origin="lower", interpolation="nearest", vmin=0, vmax=1)
            axes.set(title=title, aspect="equal")
        for (title, points), axes in zip(panels, every[len(heats) :], strict=True):
            axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=3, linewidths=0, alpha=0.6)
            axes.set(title=title, xlim=box[:2], ylim=box[2:], aspect="equal")

    return plot(draw, width=3.8 * columns, height=(3.4 * tall + 0.6) * rows)


def overlays(real: Float[Tensor, " n D"], sampled: Float[Tensor, " m D"], most: int = 8) -> bytes:
    """Histograms of the first coordinates, data and samples on top of each other."""

    def draw(canvas: Any) -> None:
        count = min(real.shape[1], most)
        columns = min(4, count)
        for d, axes in enumerate(canvas.subplots(-(-count // columns), columns, squeeze=False).ravel()):
            if d >= count:
                axes.set_axis_off()
                continue
            low, high = real[:, d].min().item(), real[:, d].max().item()
            room = 0.1 * (high - low) or 1.0
            edges = np.linspace(low - room, high + room, 41)
            for values, name in ((real, "data"), (sampled, "samples")):
                axes.hist(values[:, d].numpy().clip(edges[0], edges[-1]), edges, density=True, alpha=0.5, label=name)
            axes.set(title=f"coordinate {d}", yticks=[])
        canvas.axes[0].legend()

    return plot(draw, width=9, height=2.4 * -(-min(real.shape[1], most) // 4))


def _spread(x: Tensor, spec: DataSpec) -> Float[Tensor, " B *shape"]:
    """Onto [0, 1]."""
    x = x.cpu().float()
    if spec.levels is not None:
        return (x / (spec.levels - 1)).nan_to_num(0.0).clamp(0, 1)
    low, high = x.min(), x.max()
    return ((x - low) / (high - low).clamp_min(1e-12)).nan_to_num(0.0)
