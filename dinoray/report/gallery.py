"""The pictures of the page: cards of sampled inputs with their maps, and neighbours as thumbnails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from dinoray.errors import OutputDamaged
from dinoray.io.items import Item
from dinoray.report.neighbours import Neighbours, item_vectors, nearest
from dinoray.report.pca import MAX_TILES, Basis, DenseReader, draw_map, fit_bases
from dinoray.report.pictures import (
    COLOUR_NAMES,
    Picture,
    as_uint8,
    data_uri,
    draw_composites,
    one_line,
    read_pictures,
    shrink,
    thumbnail_size,
)
from dinoray.report.plots import number
from dinoray.report.run import Run
from dinoray.report.sample import Sample, SampledItem, evenly

CARDS = 24
CARD_ROWS = 44
"""Channel rows on all cards together: multi-channel runs get fewer cards."""
CHANNELS_PER_CARD = 8
SIDE = 288
"""Longest side of a picture on a card, px."""
SMALL_SIDE = 144
QUERIES, FOUND = 8, 5
_PIXELATED_BELOW = 96
_FIRST_METADATA = ("Plate", "Well", "Site")
_METADATA_SHOWN = 5


@dataclass
class CardRow:
    """One channel of a card: the picture and its map as data URIs, empty where there is none."""

    channel: str
    image: str = ""
    map: str = ""
    tiles: int = 0
    kind: str = "tiles"
    """What the rows are: tiles or objects."""
    note: str = ""


@dataclass
class Card:
    """One input on the page."""

    item_id: str
    size: str
    rows: list[CardRow]
    problem: str = ""
    composite: str = ""
    """All channels in one picture (data URI), where there are several rows."""
    metadata: list[str] = field(default_factory=list)
    more_channels: int = 0
    small: bool = False
    """Few pixels: enlarge them without smoothing."""

    @property
    def is_multi(self) -> bool:
        """Whether the card shows several channels."""
        return len(self.rows) > 1


@dataclass
class Thumb:
    """One picture among neighbours; `similarity` is empty for the query."""

    item_id: str
    image: str
    problem: str
    similarity: str = ""
    share: float = 0.0
    """Similarity as 0..1 for a bar, 0 where negative."""


@dataclass
class Gallery:
    """All pictures of the page."""

    cards: list[Card] = field(default_factory=list)
    bases: dict[str, Basis] = field(default_factory=dict)
    """Of the feature maps, by channel; empty without patch grids."""
    neighbours: list[list[Thumb]] = field(default_factory=list)
    compared: int = 0
    """Items that took part in the search."""
    groups: int = 0
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(channel, colour) of the composites, where all have the same channels."""
    left_out: bool = False
    """Whether channels with a bright background are not in the composites."""


def build_gallery(run: Run, sample: Sample) -> Gallery:
    """Choose items, read them again, draw maps and find neighbours.

    Raises OutputDamaged when patch grids that rows name are missing; inputs that cannot be read become
    placeholders. Memory: the sample, two decoded inputs, and the thumbnails.
    """
    shown = [sample.items[i] for i in evenly(len(sample.items), _num_cards(sample))]
    groups = item_vectors(sample)
    pairs = nearest(groups, queries=QUERIES, count=FOUND)
    others = [sample.items[i] for one in pairs for i in (one.query, *(i for i, _ in one.found))]
    pictures = read_pictures(planned_items(run, [*shown, *others]), run, side=SIDE)
    draw_composites(list(pictures.values()))
    reader = DenseReader(run.store.url)
    names = sample.table["channel"].to_pylist()
    wanted = dict.fromkeys(channel for item in shown
                           for channel in list(dict.fromkeys(names[item.start:item.stop]))[:CHANNELS_PER_CARD])
    gallery = Gallery(bases=fit_bases(sample, reader, list(wanted)))
    gallery.cards = [_card(item, sample, pictures[item.item_id], gallery.bases, reader) for item in shown]
    gallery.neighbours = [_thumbs(one, sample, pictures) for one in pairs]
    gallery.compared = sum(len(group.positions) for group in groups)
    gallery.groups = len(groups)
    coloured = {picture.coloured for picture in pictures.values()} - {()}
    if len(coloured) == 1:
        names = coloured.pop()
        gallery.legend = list(zip(names, COLOUR_NAMES, strict=False))
        gallery.left_out = any(set(p.channels) > set(names) for p in pictures.values() if p.coloured)
    return gallery


def planned_items(run: Run, wanted: Iterable[SampledItem]) -> list[Item]:
    """The plan's items (files, group, channels) of sampled items, each once, by unit."""
    by_unit: dict[tuple[int, int], dict[str, None]] = {}
    for item in wanted:
        by_unit.setdefault((item.part.generation, item.part.number), {})[item.item_id] = None
    found: list[Item] = []
    for generation, number_ in sorted(by_unit):
        ids = by_unit[generation, number_]
        unit = run.generations[generation].plan.unit(number_)
        items = {item.item_id: item for item in unit.items if item.item_id in ids}
        absent = [item_id for item_id in ids if item_id not in items]
        if absent:
            raise OutputDamaged(f"rows of {absent[0]!r}, which is not in the plan's unit {number_}",
                                where=run.store.url, todo="see `dinoray verify --deep`")
        found += [items[item_id] for item_id in ids]
    return found


def _num_cards(sample: Sample) -> int:
    if not sample.items:
        return 0
    channels = sample.table["channel"].to_pylist()
    typical = median(len(set(channels[item.start:item.stop])) for item in sample.items[:256])
    return int(min(CARDS, max(4, CARD_ROWS // min(typical, CHANNELS_PER_CARD))))


def _card(item: SampledItem, sample: Sample, picture: Picture, bases: dict[str, Basis], reader: DenseReader) -> Card:
    table = sample.table.slice(item.start, item.stop - item.start)
    height, width = table["height"][0].as_py(), table["width"][0].as_py()
    channels = list(dict.fromkeys(table["channel"].to_pylist()))
    names = np.array(table["channel"].to_pylist(), dtype=object)
    kind = "objects" if "object_id" in table.column_names else "tiles"
    rows = []
    for channel in channels[:CHANNELS_PER_CARD]:
        mine = np.flatnonzero(names == channel)
        row = CardRow(channel, tiles=len(mine), kind=kind)
        if channel in picture.channels:
            row.image = data_uri(picture.channels[channel])
        if channel in bases:
            if len(mine) > MAX_TILES:
                row.note = f"map: the first {MAX_TILES} of {len(mine)} {kind}"
                mine = mine[:MAX_TILES]
            part = table.take(mine)
            boxes = np.stack([part[name].to_numpy() for name in ("y0", "x0", "y1", "x1")], axis=1)
            grids = reader.grids(part[sample.dense_column].to_pylist(), part[sample.index_column].to_pylist())
            drawn = draw_map(bases[channel], grids, boxes, frame=(height, width), size=thumbnail_size(height, width, SIDE))
            row.map = data_uri(as_uint8(drawn), quality=88)
        rows.append(row)
    metadata = {name.removeprefix("Metadata_"): table[name][0].as_py() for name in table.column_names
                if name.startswith("Metadata_") and table[name][0].as_py() is not None}
    lines = [f"{name} {metadata[name]}" for name in (*_FIRST_METADATA, *metadata) if name in metadata]
    together = picture.composite if len(rows) > 1 else None
    pixel_size = table["pixel_size_um"][0].as_py()
    size = f"{width:,} × {height:,} px" + (f", {number(pixel_size)} µm/px" if pixel_size else "")
    return Card(item.item_id, size, rows, one_line(picture.problem), "" if together is None else data_uri(together),
                list(dict.fromkeys(lines))[:_METADATA_SHOWN], len(channels) - len(rows),
                max(height, width) < _PIXELATED_BELOW)


def _thumbs(one: Neighbours, sample: Sample, pictures: dict[str, Picture]) -> list[Thumb]:
    thumbs = [_thumb(pictures[sample.items[one.query].item_id])]
    for position, similarity in one.found:
        thumb = _thumb(pictures[sample.items[position].item_id])
        thumb.similarity, thumb.share = f"{similarity:.3f}".replace("-", "−"), min(1.0, max(0.0, similarity))
        thumbs.append(thumb)
    return thumbs


def _thumb(picture: Picture) -> Thumb:
    image = ""
    if picture.composite is not None:
        height, width = thumbnail_size(*picture.composite.shape[:2], SMALL_SIDE)
        planes = [shrink(picture.composite[..., i], height, width) for i in range(3)]
        image = data_uri(as_uint8(np.stack(planes, axis=-1) / 255))
    return Thumb(picture.item.item_id, image, one_line(picture.problem))
