"""The fixed splits of DSB 2018 stage 1, by mosaic: training images are tiles of larger fields, and a field is never split.

    python -m benchmarks.dsb_splits --data ../shared/data [--write tests/splits.json] [--montage FOLDER]

The fields are found again by benchmarks/mosaics.py. Prints the joins of tiles, those of its control, and the images and
objects of each split; the file is the same bytes every time. docs/training-data.md has the tables.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from hashlib import blake2b
from pathlib import Path

import networkx
import numpy as np

from benchmarks.mosaics import (
    CORRELATION,
    LEAST_STEP,
    PLACES,
    RATIO,
    SAME,
    SHARE,
    Mosaic,
    Overlap,
    Picture,
    components,
    copies,
    is_whole,
    montage,
    overlaps,
    stratum,
)
from dinoray.config.labelled import LabelledSource
from dinoray.io.annotations import LabelledImage, list_labelled
from dinoray.io.images import load_item

COLOUR = 6.0
"""Mean over the pixels of (highest - lowest of R, G, B), in 8-bit levels, above which an image is `histology`: gray images
have 0, the coloured ones 11.9 to 114. All coloured ones are stained tissue (purple on white, yellow or purple; pink)."""
BRIGHT = 110.0
"""Median gray level above which a gray image is `brightfield`: fluorescence has at most 52, brightfield 226 and more."""
VALIDATION = 0.15
"""Share of the training images that validate."""


def modality_of(pixels: np.ndarray) -> str:
    """`histology`, `brightfield` or `fluorescence` of image_CYX, 8 bit."""
    if (pixels.max(0).astype(float) - pixels.min(0)).mean() > COLOUR:
        return "histology"
    return "brightfield" if np.median(pixels.mean(0)) > BRIGHT else "fluorescence"


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


def fields(mosaics: list[Mosaic], common: list[Overlap]) -> tuple[list[list[str]], list[bool]]:
    """(the images of each field: mosaics, and what overlaps with them; whether all of it is full mosaics)."""
    graph = networkx.Graph((overlap.a, overlap.b) for overlap in common)
    for mosaic in mosaics:
        networkx.add_path(graph, mosaic.values())
    groups = sorted(sorted(group) for group in networkx.connected_components(graph))
    full = {name: is_whole(mosaic) for mosaic in mosaics for name in mosaic.values()}
    return groups, [all(full.get(name, True) for name in group) for group in groups]


def make(train: list[Picture], test: list[Picture]) -> dict:
    """The entry `dsb2018` of the file."""
    pictures = {p.image_id: p for p in (*train, *test)}
    trained, tested = {p.image_id for p in train}, {p.image_id for p in test}
    common = overlaps(list(pictures.values()))
    same = copies(common)
    mosaics, _ = components([p for name, p in pictures.items() if name not in same])
    groups, whole = fields(mosaics, common)
    component = {name: number for number, group in enumerate(groups) for name in group}
    of_test = {component[name] for name in tested}
    twins = defaultdict(set)
    for name, first in same.items():
        twins[first] |= {first, name}
    copied = sorted(name for family in twins.values() if family & tested for name in family & trained)
    usable = [[name for name in group if name in trained and name not in copied] for group in groups]
    # a field that test tiles come from too does not validate: thresholds are chosen there
    free = [(group, full) for number, (group, full) in enumerate(zip(usable, whole, strict=True))
            if group and number not in of_test]
    validation = choose(pictures, [group for group, _ in free], [full for _, full in free])
    return {
        "made_by": "python -m benchmarks.dsb_splits --data ../shared/data --write tests/splits.json",
        "rule": {
            "components": "images of one size and modality whose facing borders correlate and differ no more than "
                          "neighbouring rows inside, best first, where they fit on one grid; and images that overlap",
            "modality": "histology: coloured; brightfield: gray and bright; fluorescence: gray and dark",
            "validation": "whole components, by modality and size, by hash; of sizes that are mostly tiles full rectangles only; "
                          "none with test tiles",
            "copies_of_test": "training images with the pixels of a test image: in no split",
            "test_beside_train": "test images in one component with a training image",
            "correlation_at_least": CORRELATION, "ratio_at_most": RATIO, "least_step": LEAST_STEP, "overlap_correlation": SAME,
            "overlap_share": SHARE, "overlap_places": PLACES,
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


def shape_of(mosaic: Mosaic) -> str:
    """`2x2`; with the number of tiles where that is not full."""
    rows, columns = ({place[axis] for place in mosaic} for axis in (0, 1))
    full = len(rows) * len(columns) == len(mosaic)
    return f"{len(rows)}x{len(columns)}" + ("" if full else f" ({len(mosaic)})")


def print_joins(pictures: list[Picture]) -> None:
    """Joins of each kind of image against the control, and the shapes of the mosaics."""
    common = overlaps(pictures)
    same = copies(common)
    tiles = [p for p in pictures if p.image_id not in same]
    mosaics, counts = components(tiles)
    control = components(tiles, reverse=True)[1]
    keys = {p.image_id: stratum(p) for p in pictures}
    shapes = Counter((keys[next(iter(mosaic.values()))], shape_of(mosaic)) for mosaic in mosaics)
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
