"""Panels of a volume's views as inline SVG. Pictures are placed by their coordinates in nm (a viewBox in nm), so raw voxels and
features lie on each other because of where they are, not because of their sizes."""

from __future__ import annotations

import base64
import io
from math import ceil, floor, log10

import numpy as np
from markupsafe import Markup
from PIL import Image

from dinoray.report.pictures import data_uri
from dinoray.report.volume_views import Span, View

WIDTH, HEIGHT = 262.0, 340.0
"""Most px of a picture on the page."""
LEFT, RIGHT, TOP, BOTTOM = 50.0, 8.0, 6.0, 38.0
"""Margins in px, for the axes."""
_TICK_PX = 42
"""Ticks are no nearer to each other than this."""
_UNITS = ((1e6, "mm"), (1e3, "µm"), (1.0, "nm"))


def unit_of(length_nm: float) -> tuple[float, str]:
    """(nm, name) of the unit that a length is told in."""
    return next(((size, name) for size, name in _UNITS if length_nm >= 2 * size), _UNITS[-1])


def nice_below(length: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above a length."""
    power = 10.0 ** floor(log10(length) + 1e-9)
    return max(m * power for m in (1, 2, 5) if m * power <= length * (1 + 1e-9))


def define(view: View) -> Markup:
    """The view's pictures, once; the panels use them."""
    pictures = [(_id(view, "fused"), view.fused, _png(view.fused.pixels), "pixelated"),
                (_id(view, "tokens"), view.tokens, _png(view.tokens.pixels), "pixelated")]
    if view.raw is not None:
        pictures.append((_id(view, "raw"), view.raw, data_uri(view.raw.pixels, quality=88), "auto"))
    images = Markup("").join(
        Markup('<image id="{}" x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" style="image-rendering:{}" '
               'href="{}"/>')
        .format(name, _n(p.cols[0]), _n(p.rows[0]), _n(p.cols[1] - p.cols[0]), _n(p.rows[1] - p.rows[0]), how, uri)
        for name, p, uri, how in pictures)
    return Markup('<svg class="defs" width="0" height="0" aria-hidden="true"><defs>{}</defs></svg>').format(images)


def panel(view: View, layers: tuple[str, ...], corner: tuple[float, float], through: tuple[float, float] | None = None) -> Markup:
    """One panel: `layers` (raw, fused, tokens) over each other, a second one half transparent. `corner`: where the volume's
    corner lies in the world (rows, cols); `through`: where the other views cut this one, from the volume's corner."""
    (top, bottom), (left, right) = view.rows, view.cols
    scale = min(WIDTH / (right - left), HEIGHT / (bottom - top))
    width, height = (right - left) * scale, max(2.0, (bottom - top) * scale)
    box = Markup("{} {} {} {}").format(*map(_n, (left, top, right - left, bottom - top)))
    shown = Markup("").join(Markup('<use href="#{}"{}/>').format(_id(view, layer), Markup(' opacity="0.5"') if i else Markup(""))
                            for i, layer in enumerate(layers))
    lines = ""
    if through is not None:
        down, along = (through[1], top, bottom), (left, through[0], right)
        lines = Markup('<path class="cut" d="M{} {}V{}M{} {}H{}"/>').format(*map(_n, (*down, *along)))
    names, unit = ["zyx"[a] for a in view.axes], unit_of(max(bottom - top, right - left))
    ticks = _ticks(names[1], view.cols, corner[1], unit, scale, width, height, across=True) \
        + _ticks(names[0], view.rows, corner[0], unit, scale, width, height, across=False)
    frame = Markup('x="{}" y="{}" width="{}" height="{}"').format(*map(_n, (LEFT, TOP, width, height)))
    return Markup(
        '<svg class="panel" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">'
        '<rect class="void" {frame}/><rect fill="url(#hatch)" {frame}/>'
        '<svg {frame} viewBox="{box}" preserveAspectRatio="none">{shown}{lines}</svg>{ticks}{bar}</svg>').format(
        w=_n(LEFT + width + RIGHT), h=_n(TOP + height + BOTTOM), frame=frame, box=box, shown=shown, lines=lines, ticks=ticks,
        label=f"{view.name}: {' and '.join(layers)}", bar=_bar(right - left, scale, width, height))


def _ticks(name: str, span: Span, corner: float, unit: tuple[float, str], scale: float, width: float, height: float, *,
           across: bool) -> Markup:
    """The axis with its unit; numbers are world coordinates."""
    unit, unit_name = unit
    low, high = (corner + span[0]) / unit, (corner + span[1]) / unit
    step = nice_below(_TICK_PX / scale / unit)
    while step * unit * scale < _TICK_PX and step * 2 < high - low:
        step = nice_below(step * 2.5)
    parts = []
    for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1):
        at = (i * step - low) * unit * scale
        text = f"{i * step:.10g}"
        if across:
            x, y = LEFT + at, TOP + height
            parts.append(Markup('<path class="tick" d="M{} {}v4"/><text x="{}" y="{}" text-anchor="middle">{}</text>')
                         .format(_n(x), _n(y), _n(x), _n(y + 15), text))
        else:
            x, y = LEFT, TOP + at
            parts.append(Markup('<path class="tick" d="M{} {}h-4"/><text x="{}" y="{}" text-anchor="end">{}</text>')
                         .format(_n(x), _n(y), _n(x - 6), _n(y + 3.5), text))
    if across:
        label = Markup('<text class="axis-name" x="{}" y="{}" text-anchor="middle">{} ({})</text>').format(
            _n(LEFT + width / 2), _n(TOP + height + 31), name, unit_name)
    else:
        middle = _n(TOP + max(height / 2, 24))
        label = Markup('<text class="axis-name" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{} ({})</text>') \
            .format(middle, name, unit_name)
    return Markup("").join([*parts, label])


def _bar(span_nm: float, scale: float, width: float, height: float) -> Markup:
    """A scale bar of a round length, about a quarter of the width, in the lower right corner."""
    length = nice_below(span_nm * 0.3)
    unit, unit_name = unit_of(2 * length)
    px, x, y = length * scale, LEFT + width - 10, TOP + height - 9
    return Markup('<path class="halo" d="M{x0} {y}H{x1}"/><path class="bar" d="M{x0} {y}H{x1}"/>'
                  '<text class="bar-text" x="{mid}" y="{ty}" text-anchor="middle">{text}</text>').format(
        x0=_n(x - px), x1=_n(x), y=_n(y), mid=_n(x - px / 2), ty=_n(y - 6), text=f"{length / unit:g} {unit_name}") \
        if height > 24 else Markup("")


def _id(view: View, layer: str) -> str:
    return f"{view.name}-{layer}"


def _n(value: float) -> str:
    """A number of SVG: nine digits, no exponent for what is of use."""
    return f"{value:.9g}"


def _png(pixels: np.ndarray) -> Markup:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", optimize=True)
    return Markup("data:image/png;base64,") + base64.b64encode(sink.getvalue()).decode()
