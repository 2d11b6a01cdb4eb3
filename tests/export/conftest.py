"""One small output of two plates, made once: what most tests of the export read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tifffile

from tests.conftest import texture
from tests.runs import run, use_tiny_backbone


def write_plates(folder: Path, plates: dict[str, tuple[int, int]], *, sites: int = 2, channels: int = 2, side: int = 64) -> Path:
    """Phenix names: plate -> (rows, columns) of wells; 16-bit fields that differ between wells."""
    for number, (plate, (rows, columns)) in enumerate(plates.items()):
        (folder / plate).mkdir(parents=True)
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                for site in range(1, sites + 1):
                    for channel in range(1, channels + 1):
                        seed = ((number * 16 + row) * 32 + column) * 64 + site * 8 + channel
                        tifffile.imwrite(folder / plate / f"r{row:02d}c{column:02d}f{site:02d}p01-ch{channel}sk1fk1fl1.tiff",
                                         texture((side, side), seed, "uint16") // (1 + column % 3))
    return folder


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """Jobs in this process compute with a backbone of width 16, in this module (a patch of the session would reach others)."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch)
        yield


@pytest.fixture(scope="session")
def plates_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plates P10 and P9 of 2x3 wells, 2 sites, ch1 and ch2; site 1 of P9 A02 and both of P9 B03 are damaged."""
    folder = tmp_path_factory.mktemp("plates")
    write_plates(folder / "images", {"P10": (2, 3), "P9": (2, 3)})
    for name in ("r01c02f01", "r02c03f01", "r02c03f02"):
        (folder / "images/P9" / f"{name}p01-ch1sk1fk1fl1.tiff").write_bytes(b"II*\0 no TIFF")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch)
        run(folder / "images", folder / "out", unit_items=5, max_failed_fraction=1.0)
    return folder / "out"
