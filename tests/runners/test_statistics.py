"""Statistics units: the merged histograms give numpy's percentiles over all pixels of a plate."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoray.io.images import Limits
from dinoray.io.items import Item
from dinoray.ledger import Ledger, Receipt
from dinoray.runners.statistics import (
    FLOAT_VALUES,
    HISTOGRAM_SCHEMA,
    PREFIX,
    SCALING_SCHEMA,
    StatisticsRunner,
    histogram,
    merge,
    read_scaling,
    scaling_table,
)
from dinoray.vision.intensity import scaling_key
from tests.conftest import texture
from tests.runs import DictStore, item_of_file, make_plan

PERCENTS = (0.1, 99.9)


def run(items: list[Item], *, max_items: int = 2, percents: tuple[float, float] = PERCENTS):
    store = DictStore()
    plan = make_plan(store, items, prefix=PREFIX, max_items=max_items)
    ledger = Ledger(store, PREFIX)
    runner = StatisticsRunner(plan, ledger, limits=Limits(), z_projection="refuse", decode_threads=2,
                              prefetch_bytes=10**9)
    try:
        receipts = list(runner.lease(range(len(plan))))
    finally:
        runner.close()
    return read_scaling(scaling_table(store, receipts, percents)), receipts, store


def save(path: Path, pixels: np.ndarray, **fields: object) -> Item:
    metadata = {"axes": "CYX"} if pixels.ndim == 3 else None
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=metadata, ome=False)
    return item_of_file(path, **fields)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32"])
@pytest.mark.parametrize("max_items", [1, 3, 100])
def test_percentiles_over_all_pixels_of_a_group(tmp_path: Path, dtype: str, max_items: int) -> None:
    images, items = {"p": [], "q": []}, []
    for i in range(7):
        group = "p" if i < 4 else "q"
        pixels = texture((2, 32 + 8 * i, 40), i, "uint16" if dtype != "uint8" else "uint8").astype(dtype)
        images[group].append(pixels)
        items.append(save(tmp_path / f"{i}.tif", pixels, group=group, plate=None))
    scaling, receipts, _ = run(items, max_items=max_items)
    assert set(scaling) == {"p", "q"}
    for group, found in images.items():
        for channel in range(2):
            values = np.concatenate([p[channel].ravel() for p in found]).astype(np.float64)
            key = scaling_key(str(channel), np.dtype(dtype))
            assert scaling[group][key] == pytest.approx(tuple(np.percentile(values, PERCENTS)), rel=1e-9)
    assert sum(r.items for r in receipts) == 7


def test_parts_are_tables_of_exact_counts(tmp_path: Path) -> None:
    pixels = texture((32, 32), 1, "uint16")
    _, receipts, store = run([save(tmp_path / "a.tif", pixels, group="gé")])
    table = pq.read_table(io.BytesIO(store.objects[receipts[0].objects[0].key]))
    assert table.schema.equals(HISTOGRAM_SCHEMA)
    values, counts = np.unique(pixels, return_counts=True)
    assert table["value"].to_pylist() == values.tolist()
    assert table["count"].to_pylist() == counts.tolist()
    assert set(table["group"].to_pylist()) == {"gé"}
    assert set(table["channel"].to_pylist()) == {"gray"}


def test_8_bit_rgb_needs_no_statistics_and_bad_images_are_left_to_the_main_pass(tmp_path: Path) -> None:
    rgb = np.ascontiguousarray(np.moveaxis(texture((3, 32, 32), 1), 0, -1))
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    (tmp_path / "bad.tif").write_bytes(b"II*\0 torn")
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(tmp_path / "constant.png")
    items = [item_of_file(tmp_path / name, group="g") for name in ("rgb.png", "bad.tif", "constant.png")]
    scaling, receipts, store = run(items)
    assert scaling == {}
    assert sum(r.quarantined for r in receipts) == 2
    assert {reason for r in receipts for reason in r.reasons} >= {"constant"}
    assert not any(r.objects for r in receipts)


def test_nothing_to_sample() -> None:
    scaling, receipts, store = run([])
    assert (scaling, receipts) == ({}, [])
    assert scaling_table(store, [], PERCENTS).schema.equals(SCALING_SCHEMA)


def test_channels_that_only_some_images_have(tmp_path: Path) -> None:
    one, two = texture((32, 32), 1, "uint16"), texture((2, 32, 32), 2, "uint16")
    items = [save(tmp_path / "1.tif", one, group="g"), save(tmp_path / "2.tif", two, group="g")]
    scaling, _, _ = run(items, max_items=9)
    assert set(scaling["g"]) == {"gray", "0", "1"}
    assert scaling["g"]["gray"] == pytest.approx(tuple(np.percentile(one, PERCENTS)))


@pytest.mark.parametrize("shape", [(300, 400), (1, 400_000), (2, 300_000), (400_000, 1), (5, 70_000), (700, 100)])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_large_images_of_other_dtypes_are_sampled_evenly(shape: tuple[int, int], dtype: str) -> None:
    plane = np.random.default_rng(0).permutation(shape[0] * shape[1]).reshape(shape).astype(dtype)
    values, counts = histogram(plane)
    assert 0 < counts.sum() <= FLOAT_VALUES
    assert counts.sum() > min(plane.size, FLOAT_VALUES) / 8
    assert np.isin(values, plane).all()
    for percent in (10, 50, 90):
        got = np.percentile(np.repeat(values, counts), percent) / plane.size * 100
        assert got == pytest.approx(percent, abs=3)


def test_a_line_scan_among_the_sample_does_not_stop_the_run(tmp_path: Path) -> None:
    line = np.random.default_rng(1).random((1, 300_000)).astype(np.float32)
    scaling, _, _ = run([save(tmp_path / "line.tif", line, group="g")])
    assert scaling["g"]["gray [float32]"] == pytest.approx((0.001, 0.999), abs=0.01)


VALUES = st.lists(st.lists(st.integers(-5, 60), min_size=1, max_size=30), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(parts=VALUES)
def test_merging_is_concatenating(parts: list[list[int]]) -> None:
    histograms = [np.unique(np.array(p, dtype=np.float64), return_counts=True) for p in parts]
    values, counts = merge(histograms)
    expected, expected_counts = np.unique(np.concatenate([np.array(p) for p in parts]), return_counts=True)
    assert values.tolist() == expected.tolist()
    assert counts.tolist() == expected_counts.tolist()
    nested = merge([merge(histograms[:1]), merge(histograms)])
    assert nested[1].sum() == counts.sum() + len(parts[0])


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.integers(0, 255), min_size=4, max_size=64),
       dtype=st.sampled_from(["uint8", "uint16", "int16", "float32"]))
def test_a_histogram_holds_every_pixel(values: list[int], dtype: str) -> None:
    plane = np.array(values, dtype=dtype)[None]
    found, counts = histogram(plane)
    assert np.repeat(found, counts).tolist() == sorted(values)


def test_groups_that_span_parts_are_held_only_while_they_are_open() -> None:
    """Three parts: group b spans all of them, a ends in the first, c begins in the last."""
    store, rng, receipts = DictStore(), np.random.default_rng(0), []
    pixels: dict[str, list[np.ndarray]] = {}
    for number, groups in enumerate((["a", "b"], ["b"], ["b", "c"])):
        tables = []
        for group in groups:
            for channel in ("x", "y"):
                data = rng.integers(0, 50, 40)
                pixels.setdefault(group + channel, []).append(data)
                values, counts = np.unique(data, return_counts=True)
                tables.append({"group": [group] * len(values), "channel": [channel] * len(values),
                               "value": values.astype(float).tolist(), "count": counts.tolist()})
        sink = io.BytesIO()
        pq.write_table(pa.concat_tables(pa.table(t, schema=HISTOGRAM_SCHEMA) for t in tables), sink)
        stored = Ledger(store, PREFIX).put_object(f"{PREFIX}/part-{number}.parquet", sink.getvalue())
        receipts.append(Receipt(unit=str(number), number=number, fingerprint="f", objects=[stored]))
    table = scaling_table(store, receipts, (5, 95))
    assert table["group"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert table["num_values"].to_pylist() == [40, 40, 120, 120, 40, 40]
    for row in table.to_pylist():
        expected = np.percentile(np.concatenate(pixels[row["group"] + row["channel"]]), (5, 95))
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected))
