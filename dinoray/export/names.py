"""Names of wide columns, such that pycytominer finds the features by their prefix.

`<Compartment>_dinov3_<model>_<channel>_<vector>_<number>`: Cells_dinov3_vits16_DNA_cls_0000. The compartment is `Cells`
for whole fields too: pycytominer.cyto_utils.infer_cp_features finds Cells, Nuclei and Cytoplasm by itself, but Image only
when each call says image_features=True.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

COMPARTMENTS = ("Image", "Cells", "Nuclei", "Cytoplasm")
DEFAULT_COMPARTMENT = "Cells"


def plain(text: str) -> str:
    """Only ASCII letters and digits, so that a name survives `DataFrame.query`, R and SQL; may come out empty."""
    return re.sub(r"[^A-Za-z0-9]+", "", text)


def channel_labels(channels: Sequence[str]) -> list[str]:
    """One label per channel: letters and digits of its name; where two would be equal, the later ones get x2, x3, ..."""
    labels: list[str] = []
    for name in channels:
        base = plain(name) or "channel"
        label, number = base, 1
        while label in labels:
            number += 1
            label = f"{base}x{number}"
        labels.append(label)
    return labels


def feature_names(compartment: str, model: str, channels: Sequence[str], vectors: Sequence[tuple[str, int]]) -> list[str]:
    """Names of all feature columns, ordered by channel, vector (name, D), number."""
    stem = f"{compartment}_dinov3_{plain(model.removeprefix('dinov3')) or 'model'}"
    return [f"{stem}_{label}_{vector}_{i:04d}" for label in channel_labels(channels) for vector, dim in vectors for i in range(dim)]


def widened(vector: str, dim: int) -> list[str]:
    """Names of the columns of one vector column in a flat table: cls_0000, cls_0001, ..."""
    return [f"{vector}_{i:04d}" for i in range(dim)]
