"""The fixed splits of DSB 2018 stage 1, by mosaic: training images are tiles of larger fields, and a field is never split.

    python -m benchmarks.dsb_splits --data ../shared/data [--write tests/splits.json] [--montage FOLDER]

Two images are joined when their facing borders continue each other: the rows (columns) on both sides of the seam
correlate, and differ no more than neighbouring rows inside these images do. Joins are taken from the best on, and only
where the tiles still fit on one grid. The control is the same with one border reversed, where no join can be true.
Prints how many joins both give, and the images and objects of each split; the file is the same bytes every time.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from dinoray.config.labelled import LabelledSource
from dinoray.io.annotations import LabelledImage, list_labelled
from dinoray.io.images import load_item

COLOUR = 6.0
"""Mean over the pixels of (highest - lowest of R, G, B), in 8-bit levels, above which an image is `histology`: gray images
have 0, the coloured ones 11.9 to 114. All coloured ones are stained tissue (purple on white, yellow or purple; pink)."""
BRIGHT = 110.0
"""Median gray level above which a gray image is `brightfield`: fluorescence has at most 52, brightfield 226 and more."""
CORRELATION = 0.5
"""Least correlation of two facing borders."""
RATIO = 1.3
"""Most mean difference of two facing borders, relative to that of neighbouring rows inside: true seams have 0.7 to 1.3."""
LEAST_STEP = 0.25
"""Gray levels below which neighbouring rows inside count as this different: else empty borders would divide by 0."""
SAME = 0.9
"""Correlation of 32 x 32 thumbnails above which two images of one size are the same: found 1.000 and 0.977, then 0.63."""
VALIDATION = 0.15
"""Share of the training images that validate."""


@dataclass(frozen=True)
class Picture:
    """One image, gray, and what is told from its pixels."""

    image_id: str
    gray: np.ndarray
    modality: str


@dataclass(frozen=True)
class Join:
    """Image b continues image a to the right (0, 1) or below (1, 0)."""

    correlation: float
    ratio: float
    a: str
    b: str
    step: tuple[int, int]


def modality_of(pixels: np.ndarray) -> str:
    """`histology`, `brightfield` or `fluorescence` of image_CYX, 8 bit."""
    if (pixels.max(0).astype(float) - pixels.min(0)).mean() > COLOUR:
        return "histology"
    return "brightfield" if np.median(pixels.mean(0)) > BRIGHT else "fluorescence"


def borders(pictures: list[Picture], step: tuple[int, int], end: bool) -> tuple[np.ndarray, np.ndarray]:
    """(the last or first row or column of each picture [N, L], mean difference to the one beside it inside [N])."""
    outer, inner = (-1, -2) if end else (0, 1)
    rows = [(p.gray[outer], p.gray[inner]) if step == (1, 0) else (p.gray[:, outer], p.gray[:, inner]) for p in pictures]
    edge = np.array([row for row, _ in rows])
    return edge, np.abs(edge - np.array([row for _, row in rows])).mean(1)


def joins(pictures: list[Picture], *, reverse: bool = False) -> list[Join]:
    """Joins among pictures of one size, the best first. reverse: the control."""
    found = []
    for step in ((0, 1), (1, 0)):
        a, step_a = borders(pictures, step, end=True)
        b, step_b = borders(pictures, step, end=False)
        b = b[:, ::-1] if reverse else b
        za, zb = (x - x.mean(1, keepdims=True) for x in (a, b))
        norms = np.sqrt(np.outer((za ** 2).sum(1), (zb ** 2).sum(1)))
        correlation = za @ zb.T / np.maximum(norms, 1e-9)
        difference = np.array([np.abs(row - b).mean(1) for row in a])
        ratio = difference / np.maximum((step_a[:, None] + step_b[None]) / 2, LEAST_STEP)
        fits = (correlation >= CORRELATION) & (ratio <= RATIO) & ~np.eye(len(pictures), dtype=bool)
        found += [Join(round(float(correlation[i, j]), 6), round(float(ratio[i, j]), 6), pictures[i].image_id, pictures[j].image_id,
                       step) for i, j in np.argwhere(fits)]
    return sorted(found, key=lambda join: (-join.correlation, join.ratio, join.a, join.b))


def assemble(names: list[str], found: list[Join]) -> tuple[list[dict[tuple[int, int], str]], int]:
    """(mosaics as {(row, column): image}, joins that fitted): every image is in one mosaic, many alone."""
    place = {name: (name, 0, 0) for name in names}
    mosaics = {name: {(0, 0): name} for name in names}
    taken = 0
    for join in found:
        (first, ya, xa), (second, yb, xb) = place[join.a], place[join.b]
        dy, dx = ya + join.step[0] - yb, xa + join.step[1] - xb
        if first == second:
            taken += (dy, dx) == (0, 0)
            continue
        moved = {(y + dy, x + dx): name for (y, x), name in mosaics[second].items()}
        if moved.keys() & mosaics[first].keys():
            continue
        mosaics[first] |= moved
        del mosaics[second]
        place |= {name: (first, y, x) for (y, x), name in moved.items()}
        taken += 1
    return [dict(sorted(mosaic.items())) for mosaic in mosaics.values()], taken


def copies(pictures: list[Picture]) -> dict[str, str]:
    """Image -> the first image (by id) of one size with the same content, for images that have one."""
    found: dict[str, str] = {}
    for same_size in by(pictures, lambda p: p.gray.shape).values():
        thumbs = np.array([np.asarray(Image.fromarray(p.gray).resize((32, 32), Image.Resampling.BOX)).ravel() for p in same_size])
        thumbs -= thumbs.mean(1, keepdims=True)
        thumbs /= np.maximum(np.linalg.norm(thumbs, axis=1, keepdims=True), 1e-9)
        for i, j in np.argwhere(np.triu(thumbs @ thumbs.T > SAME, 1)):
            found.setdefault(same_size[j].image_id, found.get(same_size[i].image_id, same_size[i].image_id))
    return found


def by(pictures: list[Picture], key) -> dict:
    """Pictures in groups, in the order of ids."""
    groups = defaultdict(list)
    for picture in sorted(pictures, key=lambda p: p.image_id):
        groups[key(picture)].append(picture)
    return dict(groups)


def stratum(picture: Picture) -> tuple[str, int, int]:
    """What joined images share: modality and size."""
    return picture.modality, *picture.gray.shape


def components(pictures: list[Picture], *, reverse: bool = False) -> tuple[list[dict[tuple[int, int], str]], dict[tuple, list[int]]]:
    """(mosaics, {stratum: [pairs compared, joins taken]}); a copy of an image is in none of them."""
    same = copies(pictures)
    mosaics, counts = [], {}
    for key, group in sorted(by([p for p in pictures if p.image_id not in same], stratum).items()):
        found, taken = assemble([p.image_id for p in group], joins(group, reverse=reverse))
        mosaics += found
        counts[key] = [2 * len(group) * (len(group) - 1), taken]
    return sorted(mosaics, key=lambda mosaic: min(mosaic.values())), counts


def is_whole(mosaic: dict[tuple[int, int], str]) -> bool:
    """Whether a mosaic of several tiles is a full rectangle: no neighbour of its tiles can be elsewhere unseen."""
    rows, columns = {y for y, _ in mosaic}, {x for _, x in mosaic}
    return len(rows) > 1 and len(columns) > 1 and len(rows) * len(columns) == len(mosaic)


def choose(pictures: dict[str, Picture], groups: list[list[str]], whole: list[bool]) -> list[str]:
    """The validation images: whole groups, in each stratum as near to its share as they allow, by the hash of their ids.

    Where most images of a stratum are tiles, only full mosaics validate: a tile whose neighbours were not found (its
    borders are empty) might be beside any other.
    """
    strata = defaultdict(list)
    for group, full in zip(groups, whole, strict=True):
        strata[stratum(pictures[group[0]])].append((group, full))
    chosen: list[str] = []
    for _, members in sorted(strata.items()):
        total = sum(len(group) for group, _ in members)
        tiled = sum(len(group) for group, _ in members if len(group) > 1) > total / 2
        allowed = [group for group, full in members if full or not tiled]
        missing = VALIDATION * total
        for group in sorted(allowed, key=lambda group: blake2b(min(group).encode(), digest_size=8).digest()):
            if abs(missing - len(group)) < abs(missing):
                chosen += group
                missing -= len(group)
    return sorted(chosen)


def make(train: list[Picture], test: list[Picture]) -> dict:
    """The entry `dsb2018` of the file."""
    pictures = {p.image_id: p for p in (*train, *test)}
    trained, tested = {p.image_id for p in train}, {p.image_id for p in test}
    same = copies(list(pictures.values()))
    mosaics, _ = components(list(pictures.values()))
    groups = [sorted([*mosaic.values(), *(name for name, first in same.items() if first in mosaic.values())]) for mosaic in mosaics]
    component = {name: number for number, group in enumerate(groups) for name in group}
    of_test = {component[name] for name in tested}
    twins = defaultdict(set)
    for name, first in same.items():
        twins[first] |= {first, name}
    copied = sorted(name for family in twins.values() if family & tested for name in family & trained)
    usable = [[name for name in group if name in trained and name not in copied] for group in groups]
    # a field that test tiles come from too does not validate: thresholds are chosen there
    free = [(group, is_whole(mosaic)) for number, (group, mosaic) in enumerate(zip(usable, mosaics, strict=True))
            if group and number not in of_test]
    validation = choose(pictures, [group for group, _ in free], [full for _, full in free])
    return {
        "made_by": "python -m benchmarks.dsb_splits --data ../shared/data --write tests/splits.json",
        "rule": {
            "components": "images of one size and modality whose facing borders correlate and differ no more than neighbouring rows "
                          "inside, best first, where they fit on one grid; and copies",
            "modality": "histology: coloured; brightfield: gray and bright; fluorescence: gray and dark",
            "validation": "whole components, by modality and size, by hash; of sizes that are mostly tiles full rectangles only; "
                          "none with test tiles",
            "copies_of_test": "training images with the pixels of a test image: in no split",
            "test_beside_train": "test images in one component with a training image",
            "correlation_at_least": CORRELATION, "ratio_at_most": RATIO, "least_step": LEAST_STEP, "thumbnail_correlation": SAME,
            "colour_above": COLOUR, "bright_above": BRIGHT, "share": VALIDATION,
        },
        "components": len(groups),
        "train": sorted(trained - set(validation) - set(copied)),
        "validation": validation,
        "test": sorted(tested),
        "copies_of_test": copied,
        "test_beside_train": sorted(name for name in tested if set(groups[component[name]]) & trained),
        "modality": {name: pictures[name].modality for name in sorted(pictures)},
        "component": {name: component[name] for name in sorted(component)},
    }


def sources(data: Path) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """(all training images, all test images) of stage 1."""
    stage1, rest = data / "dsb2018_stage1", data / "dsb2018_stage1_rest"
    train = list_labelled(LabelledSource(images=str(stage1 / "stage1_train"), kind="dsb"))
    train += list_labelled(LabelledSource(images=str(rest / "images"), labels=str(rest / "labels"), kind="pairs"))
    return train, list_labelled(LabelledSource(images=str(stage1 / "stage1_test"), kind="dsb"))


def picture_of(image: LabelledImage) -> Picture:
    """An image, read without its labels."""
    pixels = load_item(image.item, image.limits).image.pixels
    return Picture(image.image_id, pixels.mean(0, dtype=np.float32), modality_of(pixels))


def all_splits(data: Path) -> dict:
    """The content of tests/splits.json."""
    train, test = ([picture_of(image) for image in images] for images in sources(data))
    cells = LabelledSource(images=str(data / "usiigaci_phase_train/*/raw.tif"),
                           labels=str(data / "usiigaci_phase_train/*/instances_ids.png"))
    return {"dsb2018": make(train, test),
            "usiigaci": {"rule": "phase contrast, never trained on", "test": [image.image_id for image in list_labelled(cells)]}}


def text_of(splits: dict) -> str:
    """The file: one line per id."""
    return json.dumps(splits, indent=1) + "\n"


def print_joins(pictures: list[Picture]) -> None:
    """Joins of each kind of image against the control, and the shapes of the mosaics."""
    mosaics, counts = components(pictures)
    control = components(pictures, reverse=True)[1]
    shapes = Counter()
    keys = {p.image_id: stratum(p) for p in pictures}
    for mosaic in mosaics:
        rows, columns = ({place[axis] for place in mosaic} for axis in (0, 1))
        shapes[keys[next(iter(mosaic.values()))], f"{len(rows)}x{len(columns)}" + ("" if is_whole(mosaic) else f" ({len(mosaic)})")] += 1
    print("| modality | size | borders compared | joins | joins of the control | mosaics: rows x columns (tiles, where not full) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for key, (compared, taken) in counts.items():
        own = ", ".join(f"{number} of {shape}" for (k, shape), number in sorted(shapes.items()) if k == key)
        print(f"| {key[0]} | {key[1]} x {key[2]} | {compared:,} | {taken} | {control[key][1]} | {own} |")


def print_counts(splits: dict, data: Path) -> None:
    """Images, objects and mosaics of each split and modality."""
    entry = splits["dsb2018"]
    objects = {image.image_id: len(np.unique(labels[labels > 0])) for images in sources(data) for image in images
               for labels in [image.read_labels()]}
    print("\n| split | modality | images | objects | components |\n| --- | --- | --- | --- | --- |")
    for split in ("train", "validation", "test", "copies_of_test", "test_beside_train"):
        for modality in ("fluorescence", "histology", "brightfield"):
            names = [name for name in entry[split] if entry["modality"][name] == modality]
            if names:
                print(f"| {split} | {modality} | {len(names)} | {sum(objects[name] for name in names):,} | "
                      f"{len({entry['component'][name] for name in names})} |")


def montage(pictures: list[Picture], folder: Path, tile: int = 64) -> None:
    """One PNG per kind of image with its mosaics of several tiles, stitched, with a gap between mosaics."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {p.image_id: p for p in pictures}
    sheets = defaultdict(list)
    for mosaic in components(pictures)[0]:
        if len(mosaic) > 1:
            sheets[stratum(known[next(iter(mosaic.values()))])].append(mosaic)
    for key, mosaics in sheets.items():
        blocks = []
        for mosaic in mosaics:
            top, left = (min(place[axis] for place in mosaic) for axis in (0, 1))
            block = np.zeros(((max(y for y, _ in mosaic) - top + 1) * tile, (max(x for _, x in mosaic) - left + 1) * tile), np.uint8)
            light = max(40.0, max(float(np.percentile(known[name].gray, 99.5)) for name in mosaic.values()))
            for (y, x), name in mosaic.items():
                small = Image.fromarray(np.clip(known[name].gray * 255 / light, 0, 255).astype(np.uint8)).resize((tile, tile))
                block[(y - top) * tile:(y - top + 1) * tile, (x - left) * tile:(x - left + 1) * tile] = np.asarray(small)
            blocks.append(block)
        side = max(max(block.shape) for block in blocks) + 8
        columns = max(1, 1600 // side)
        sheet = np.full((-(-len(blocks) // columns) * side, columns * side), 90, np.uint8)
        for i, block in enumerate(blocks):
            y, x = i // columns * side, i % columns * side
            sheet[y:y + block.shape[0], x:x + block.shape[1]] = block
        Image.fromarray(sheet).save(folder / f"{key[0]}_{key[1]}x{key[2]}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--montage", type=Path)
    args = parser.parse_args()
    splits = all_splits(args.data)
    if args.write:
        args.write.write_text(text_of(splits))
    pictures = [picture_of(image) for images in sources(args.data) for image in images]
    if args.montage:
        montage(pictures, args.montage)
    print_joins(pictures)
    print_counts(splits, args.data)


if __name__ == "__main__":
    main()
