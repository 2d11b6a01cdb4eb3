"""Predicted label images and true ones -> pairs of one image, by name. No pixel is read to make a pair.

The name of a label image is its path below its own root without extension and without a suffix such as `_masks` or
`_cp_masks`. Names belong together when they are equal, or when one is a part of the other
cut at slashes (`7f3c` and `7f3c/images/7f3c`), and no second name fits as well. Anything else is refused by name: a wrong
pair would not fail, it would only score low.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from dinoray.config.labelled import LabelledSource
from dinoray.errors import BadRequest
from dinoray.io.annotations import list_labelled
from dinoray.io.annotations.label_files import LabelFile
from dinoray.io.annotations.labelled import Truth
from dinoray.io.annotations.listing import ids_of_file
from dinoray.io.decoded import Limits
from dinoray.io.items import Item
from dinoray.io.objects import image_stem, label_keys
from dinoray.io.sources import list_labels
from dinoray.io.storage_errors import listing_errors
from dinoray.io.stores import filesystem, is_local, local_path, on_inputs
from dinoray.wording import plural

MASKS = "masks"
"""The folder of label images in an output of `dinoray segment cells`."""
_NAMED = 5
"""Names in a message."""
_ZARR = re.compile(r"(\.ome)?\.zarr$", re.IGNORECASE)


@dataclass(frozen=True)
class TrueLabels:
    """The truth of one image, and the image itself where it is known (`None`: labels only)."""

    image_id: str
    truth: Truth
    image: Item | None = None


@dataclass(frozen=True)
class LabelPair:
    """The labels of one image, by reference. `pred` None: there is no prediction, it is scored as empty."""

    image_id: str
    truth: Truth
    pred: Truth | None
    image: Item | None = None

    def read(self, limits: Limits | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(predicted, true) labels [Y, X] int32. Raises BadRequest when their sides differ, ItemError for files that are no
        label images or cannot be read, TransientError, SystemicError."""
        limits = limits or Limits()
        truth = self.truth.read(limits)
        if self.pred is None:
            return np.zeros_like(truth), truth
        pred = self.pred.read(limits)
        if pred.shape != truth.shape:
            raise BadRequest(f"image {self.image_id}: the predicted labels are {pred.shape[0]} x {pred.shape[1]} px, the true ones "
                             f"{truth.shape[0]} x {truth.shape[1]}", where=self.pred.files[0].uri,
                             todo="write masks at the resolution of the true labels")
        return pred, truth


def list_truth(source: LabelledSource | str, note: Callable[[str], None] = lambda line: None) -> list[TrueLabels]:
    """The truth of a labelled source of any layout, or of a folder, glob or URL of label images, sorted by image_id.

    `note` gets a line about files that were passed over because others have a suffix such as `_masks` and these have not.
    Raises BadRequest when there is none, or two for one image.
    """
    if isinstance(source, LabelledSource):
        return [TrueLabels(image.image_id, image.truth, image.item) for image in list_labelled(source)]
    labels, images = _label_files(source)
    alone = [item.item_id for name, item in images.items() if name not in labels]
    if alone:
        note(f"{plural(len(alone), 'file')} without a suffix such as _masks, beside true labels with one, taken for images and "
             f"not scored: {_some(alone)}")
    return [TrueLabels(name, LabelFile(item.files[0]), images.get(name)) for name, item in sorted(labels.items())]


def list_predictions(source: str) -> dict[str, Truth]:
    """name -> label image, of a folder, glob or URL of label images, or of an output of `dinoray segment cells` (its
    folder `masks`, which may be named itself, or a glob in it). Raises BadRequest when there is none, or two of one name."""
    inside = masks_of_output(source)
    output, found, _ = source.rpartition(f"/{MASKS}")
    encoded = inside is not None or bool(found) and _is_folder(f"{output}/_dinoray")
    labels = _label_files(inside or source, encoded=encoded)[0]
    return {name: LabelFile(item.files[0], may_be_binary=True) for name, item in labels.items()}


def masks_of_output(source: str) -> str | None:
    """The folder of masks in an output of `dinoray segment cells`; None when `source` is none."""
    inside = f"{source.rstrip('/')}/{MASKS}"
    return inside if _is_folder(inside) else None


def choose(truth: Sequence[TrueLabels], ids: Sequence[str]) -> list[TrueLabels]:
    """Those of `ids`: image ids, or one `FILE.json#key/key` that names a list of them.

    Raises BadRequest when one of them is not there: a test set is scored whole.
    """
    wanted = dict.fromkeys(ids_of_file(ids[0]) if len(ids) == 1 and ".json#" in ids[0] else ids)
    known = {one.image_id: one for one in truth}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise BadRequest(f"{len(missing):,} of {len(wanted):,} ids have no true labels: {_some(missing)}", where="--ids",
                         todo=f"the truth has ids like {truth[0].image_id!r}" if truth else "check --truth")
    return [known[name] for name in sorted(wanted)]


def pair_up(predictions: dict[str, Truth], truth: Sequence[TrueLabels], *, only: Sequence[TrueLabels] | None = None,
            allow_missing: bool = False) -> tuple[list[LabelPair], list[str]]:
    """(a pair for each true image, or each of `only`, in their order; names of the predictions that no true image asks for).

    `only`: some of `truth`. A prediction may be that of an image that is not wanted, so all of the truth is looked through.
    Raises BadRequest naming up to five of the wanted images: with several predictions that fit equally well, with one that
    fits another image too, and, unless `allow_missing`, with none; also when not a single one has one.
    """
    parts, wanted = _by_part(predictions), truth if only is None else only
    fitting = {one.image_id: _fitting(one.image_id, predictions, parts) for one in truth}
    chosen = {one.image_id: fitting[one.image_id] for one in wanted}
    several = [f"{name} ({_some(found, 3)})" for name, found in chosen.items() if len(found) > 1]
    if several:
        raise BadRequest(f"{len(several):,} images have several predictions: {_some(several)}", where="--pred",
                         todo="keep one, or narrow --pred with a glob")
    owners: dict[str, list[str]] = defaultdict(list)
    for name, found in fitting.items():
        for pred in found:
            owners[pred].append(name)
    shared = [f"{pred} ({_some(names, 3)})" for pred, names in owners.items()
              if len(names) > 1 and (chosen.keys() & names) - {pred}]  # one of its very name alone is sure to be meant
    if shared:
        raise BadRequest(f"{len(shared):,} predictions fit several images: {_some(shared)}", where="--pred",
                         todo="name predictions like the true labels below their folder")
    missing = [name for name, found in chosen.items() if not found]
    if missing and (not allow_missing or len(missing) == len(chosen)):
        example = f"; predictions are named like {min(predictions)!r}" if predictions else ""
        todo = "name predictions like the true labels below their folder (or give the images that they are named like with " \
               "--images; say --kind dsb, cellpose, coco or ctc where --truth is such a data set)"
        what = f"{len(missing):,} of {len(chosen):,} images have no prediction: {_some(missing)}{example}"
        raise BadRequest(what, where="--pred",
                         todo=f"{todo}; --allow-missing scores them as empty" if len(missing) < len(chosen) else todo)
    pairs = [LabelPair(one.image_id, one.truth, predictions[chosen[one.image_id][0]] if chosen[one.image_id] else None, one.image)
             for one in wanted]
    return pairs, sorted(predictions.keys() - owners.keys())


def _label_files(source: str, *, encoded: bool = False) -> tuple[dict[str, Item], dict[str, Item]]:
    """(label images by name, images beside them by the name of their labels).

    Where some files have a label suffix, those are the label images and the others are the images. `encoded`: names are item
    ids made safe for paths (%2F).
    """
    items = list(list_labels(source).items)
    named = [(_names(unquote(item.item_id) if encoded else item.item_id), item) for item in items]
    suffixed = any(bare is not None for (bare, _), _ in named)
    labels: dict[str, Item] = {}
    images: dict[str, Item] = {}
    for (bare, name), item in named:
        if suffixed and bare is None:
            images[name.removesuffix("_img")] = item
            continue
        other = labels.setdefault(bare or name, item)
        if other is not item:
            raise BadRequest(f"two label images of one name: {other.item_id} and {item.item_id}", where=source,
                             todo="keep one, or narrow the source with a glob")
        if item.problem is not None or len(item.files) != 1:
            raise BadRequest(f"{item.item_id}: {item.problem or 'a label image is one file'}", where=source)
    return labels, images


def _names(path: str) -> tuple[str | None, str]:
    """(the name without its label suffix, None when it has none; the name) of a file's path below its root."""
    stem = image_stem(image_stem(_ZARR.sub("", path)))  # masks/a.png.tif are the masks of a.png
    keys = dict((rank, key) for rank, key in label_keys(stem))
    return keys.get(0), stem


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Every run of path parts -> the names that hold it."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split("/")
        runs = {"/".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1)}
        for run in runs:
            found[run].append(name)
    return found


def _fitting(name: str, predictions: dict[str, Truth], parts: dict[str, list[str]]) -> list[str]:
    """The predictions of an image: of its very name, else those whose name holds it, else those that it holds."""
    if name in predictions:
        return [name]
    return parts.get(name) or sorted(run for run in _by_part([name]) if run in predictions)


def _is_folder(url: str) -> bool:
    if is_local(url):
        return os.path.isdir(local_path(url))
    path = filesystem(url)[1]
    with listing_errors(url):
        return bool(on_inputs(url, lambda fs: fs.isdir(path)))


def _some(names: Iterable[str], limit: int = _NAMED) -> str:
    """Up to five names."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit:,} more" if len(names) > limit else "")
