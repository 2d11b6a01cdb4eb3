"""docs/volumes.md against the code: its options are those of the job, with their defaults, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from dinoray.config import ExtractVolumeJob, FeatureJob
from tests.report.volumes import extract, noise, write_volume

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "volumes.md").read_text()


def test_the_table_has_every_option_of_volumes_with_its_default() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `--")]
    told = {name: default for flags, default, _ in rows
            for name, default in zip((f.strip("` -").replace("-", "_") for f in flags.split(", ")),
                                     default.split(", ") * 2, strict=False)}
    fields = ExtractVolumeJob.model_fields
    assert set(told) == set(fields) - set(FeatureJob.model_fields)
    for name, default in told.items():
        value = fields[name].default
        if isinstance(value, int | float):
            assert float(default) == value, name
        elif value is not None:
            assert default == value, name


def test_the_code_that_reads_back_runs(tmp_path: Path) -> None:
    raw = write_volume(tmp_path / "em.zarr", noise((100, 128, 128)), (16.0,) * 3, (0.0,) * 3)
    out = extract(raw, tmp_path / "feats", voxel_size="64", output="fused", window_px=512, halo_px=32)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = blocks[-1].replace('"feats"', repr(out))
    found: dict[str, Any] = {"shapes": []}
    exec(re.sub(r"^(features[\[.].*?) *(#.*)?$", r"shapes.append((\1).shape)", code, flags=re.MULTILINE), found)
    assert found["shapes"] == [(192, 8, 8, 8), (192, 8, 8, 8), (192, 4, 8, 8)]
    # what the page says of napari: both begin at -8 nm
    placing = [line for line in blocks[0].splitlines() if line.startswith(("import zarr", "fused =", "scale, move ="))]
    exec("\n".join(placing).replace('"feats/', f'"{out}/'), found)
    scale, move = found["scale"]["scale"], found["move"]["translation"]
    assert np.allclose(np.subtract(move[1:], np.divide(scale[1:], 2)), -8)
    assert found["fused"]["0"][0].shape == (25, 32, 32)
