"""`open_masks(OUT)`: the masks of a segmented collection, by item id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from dinoray.errors import BadRequest
from dinoray.io.mask_files import read_mask
from dinoray.io.stores import open_store
from dinoray.io.tables import Features


class Masks:
    """The masks of an output of `dinoray segment cells`: `masks[item_id]` -> int32 [Y, X], 0 background, 1..n the cells, as
    `object_id` names them in the table of cells. Iterates over item ids in plan order."""

    def __init__(self, url: str):
        self.url, self._store = url, open_store(url)
        self.images = Features(url, "images")
        """One row per image: what was found in it, at which scale, where its mask lies."""

    @cached_property
    def _keys(self) -> dict[str, str]:
        table = self.images.table(["item_id", "mask"])
        return dict(zip(table["item_id"].to_pylist(), table["mask"].to_pylist(), strict=True))

    def __getitem__(self, item_id: str) -> np.ndarray:
        """Raises BadRequest for an id that has no mask, OutputDamaged for a mask that cannot be read."""
        key = self._keys.get(item_id)
        if key is None:
            raise BadRequest(f"there is no mask of {item_id!r}", where=self.url,
                             todo="ids are those of the tables (e.g. list(open_masks(OUT))[0]); quarantined images have none")
        return read_mask(self._store, key)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_masks(url: str | os.PathLike[str]) -> Masks:
    """Open the masks that a run of `dinoray segment cells` wrote to `url` (folder or fsspec URL). Raises BadRequest when
    there are none."""
    return Masks(os.fspath(url))
