"""Every parser of what comes from outside, fuzzed: nothing but typed errors may come out.

Each property runs a few hundred examples here and eight times as many under `-m slow`. Image decoders, CSV
manifests and LoadData cells are fuzzed in tests/io.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import yaml
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from zarr.storage import MemoryStore

from dinoray.config import ExtractImagesJob, build_job, read_job_file
from dinoray.errors import BadRequest, DinorayError, ItemError, OutputDamaged, WeightsError
from dinoray.io import ome, ome_zarr, plates
from dinoray.io.decoded import Limits
from dinoray.io.images import decode_image, load_item
from dinoray.io.sources import list_items
from dinoray.io.table_paths import from_cell
from dinoray.io.zarr_arrays import check_object, parse_array
from dinoray.ledger import Ledger, Receipt, StoredObject, Tally
from dinoray.units import Plan
from dinoray.vision.weight_files import TensorReader, find
from tests.omezarr import image_attributes, write_group
from tests.runs import DictStore, make_item, make_plan

LIMITS = Limits(max_pixels=2**20, max_bytes=2**24, max_file_bytes=2**24)
NUMBERS = st.one_of(st.integers(-3, 9), st.sampled_from([2**31, 2**40, 2**63, 2**64, -2**63, 10**30, 0.5, -1.0, 1e308]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=6)
    | st.sampled_from(["A/1", "0", "..", "/x", "yx", "c", "blosc", "NaN", "Infinity", "<u2", "|O", "\ud800", "s3://b::x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5)


@st.composite
def mutated(draw: st.DrawFn, *seeds: bytes) -> bytes:
    """One of the seeds with bytes changed, put in, and cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for place, value in draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)):
        if data:
            data[int(place * (len(data) - 1))] = value
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data[at:at] = draw(st.binary(max_size=8))
    return bytes(data[:draw(st.integers(0, len(data)))]) if draw(st.integers(0, 3)) == 0 else bytes(data)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in leaves(part, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, *seeds: Any) -> Any:
    """One of the JSON seeds with one to three values, or whole branches, replaced or removed."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(leaves(value)))
        if not path:
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        if draw(st.booleans()):
            owner[path[-1]] = draw(JSON)
        else:
            del owner[path[-1]]
    return value


def only(*kinds: type[DinorayError]) -> Callable[[Callable[[Any], Any]], Callable[[Any], None]]:
    """A property: the call returns, or raises one of these errors with something to say."""
    def wrap(call: Callable[[Any], Any]) -> Callable[[Any], None]:
        def check(value: Any) -> None:
            try:
                call(value)
            except kinds as error:
                assert error.what and (not isinstance(error, ItemError) or re.fullmatch("[a-z_]+", error.reason))
        return check
    return wrap


# ---- TIFF metadata

OME_VALUES = st.one_of(NUMBERS.map(str), st.sampled_from(["", "XYZCT", "XYCZT", "XYXYX", "uint8", "µm", "1e400", "nan"]))
OME_ATTRIBUTES = st.dictionaries(st.sampled_from(
    ["DimensionOrder", "SizeX", "SizeY", "SizeZ", "SizeC", "SizeT", "PhysicalSizeX", "PhysicalSizeY", "IFD", "FirstC", "FirstZ",
     "FirstT", "PlaneCount", "SamplesPerPixel", "Name", "UUID", "FileName"]), OME_VALUES, max_size=9)


def element(tag: str, attributes: dict[str, str], inner: str = "") -> str:
    """An XML element."""
    return f"<{tag} {' '.join(f'{k}={json.dumps(v)}' for k, v in attributes.items())}>{inner}</{tag}>"


USUAL = {"DimensionOrder": "XYZCT", "Type": "uint8", "SizeX": "8", "SizeY": "8", "SizeZ": "1", "SizeC": "3", "SizeT": "1"}
OME_XML = st.builds(
    lambda root, pixels, channel, blocks, uuid: element("OME", root, element("Image", {}, element(
        "Pixels", USUAL | pixels, element("Channel", channel) + "".join(element("TiffData", b, uuid) for b in blocks)))),
    OME_ATTRIBUTES, OME_ATTRIBUTES, OME_ATTRIBUTES, st.lists(OME_ATTRIBUTES, max_size=3),
    st.sampled_from(["", '<UUID FileName="a.tif">urn:uuid:1</UUID>']))
IMAGEJ = st.dictionaries(st.sampled_from(["images", "channels", "slices", "frames", "hyperstack", "order", "unit", "spacing"]),
                         OME_VALUES, max_size=6).map(lambda d: "ImageJ=1.54f\n" + "\n".join(f"{k}={v}" for k, v in d.items()))
SHAPED = st.builds(lambda shape, axes: json.dumps({"shape": shape, "axes": axes}), st.lists(NUMBERS, max_size=5),
                   st.text(alphabet="TZCYXSQI", max_size=5))
OTHERS = st.sampled_from(["<MetaData", "Aperio Image", "<?xml<OME", '{"NumPages": 3}', "SCANIMAGE", "frameNumbers", "<scn"])


@only(ItemError)
def tiff_description(text: str) -> None:
    """Three pages with any description decode or are refused."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for i in range(3):
            writer.write(np.full((8, 8), i, np.uint8), description=text.encode("ascii", "replace") if i == 0 else None,
                         metadata=None, contiguous=False)
    decode_image(buffer.getvalue(), "a.tif", LIMITS, z_projection="max")


@only(ItemError)
def ome_xml(text: str) -> None:
    """Any text as OME-XML."""
    ome.read_planes(text, 3, "/x/a.tif", LIMITS)


# ---- file names, tables

@only(BadRequest)
def pattern(text: str) -> None:
    """Any regex compiles or is refused, and then takes short names."""
    found = plates.get_pattern(text)
    for name in ("r01c01f01p01-ch1.tiff", "a/b.tif", "\u0663\n"):
        plates.parse(found, name)


def parquet(table: pa.Table, **options: Any) -> bytes:
    """A Parquet file's bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


TABLE = pa.table({"uri": ["a.png", "b.png"], "Plate": pa.array(["P", "Q"]).dictionary_encode(), "Site": [1, 2]})
LOADDATA = pa.table({"FileName_OrigDNA": ["a.tif"], "PathName_OrigDNA": ["/x"], "Metadata_Plate": ["P"]})


def table_of(suffix: str) -> Callable[[bytes], None]:
    """Any bytes as a table of images."""
    @only(BadRequest)
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / f"t{suffix}").write_bytes(data)
            for item in list_items([f"{folder}/t{suffix}"]).items:
                json.dumps([item.item_id, item.group, item.plate, item.metadata], ensure_ascii=False).encode()
    return check


@only(ItemError)
def cell(text: str) -> None:
    """Any text as a path in a table: what comes out is a path, or the URL of a store."""
    path = from_cell(text, "s3://lab/m")
    assert "::" not in path or "://" not in path
    assert path[:1] in "/~" or re.match(r"[a-z0-9]+://", path, re.IGNORECASE)


# ---- OME-Zarr

GROUPS = [image_attributes("tczyx", ("DNA",)), image_attributes("yx"),
          {"plate": {"wells": [{"path": "A/1"}], "rows": [{"name": "A"}], "columns": [{"name": "1"}]}},
          {"well": {"images": [{"path": "0", "acquisition": 1}]}}, {"bioformats2raw.layout": 3, "series": ["0"]},
          {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **image_attributes("cyx")}}}]


@only(ItemError)
def zarr_group(value: Any) -> None:
    """Any JSON as a group's document."""
    attributes = ome_zarr.ome_attributes(ome_zarr.parse_json(json.dumps(value).encode(), "x"), "x")
    for parse in (ome_zarr.parse_image, ome_zarr.parse_plate, ome_zarr.parse_series):
        parse(attributes, "x")
    ome_zarr.parse_well(attributes, "x")


def array_bytes(version: int, **options: Any) -> tuple[bytes, bytes]:
    """The document and the one chunk of an array of 16 x 16 pixels."""
    store = MemoryStore()
    array = zarr.create_array(store, shape=(16, 16), dtype="u2", zarr_format=version, **options)
    array[:] = np.arange(256, dtype="u2").reshape(16, 16)
    objects = {name: value.to_bytes() for name, value in store._store_dict.items()}
    document = objects.pop(".zarray" if version == 2 else "zarr.json")
    return document, max((v for k, v in objects.items() if k != ".zattrs"), key=len)


ARRAYS = [array_bytes(2, chunks=(16, 16), compressors=numcodecs.get_codec({"id": c}) if c else None)
          for c in (None, "blosc", "zstd", "gzip", "zlib", "lz4")]
ARRAYS += [array_bytes(3, chunks=(16, 16)), array_bytes(3, chunks=(8, 8), shards=(16, 16))]


@only(ItemError)
def zarr_array(value: Any) -> None:
    """Any JSON as an array's document, and then a chunk for it."""
    info = parse_array(json.dumps(value).encode(), "x")
    check_object(info, ARRAYS[1][1], "x")


@only(ItemError, BadRequest)
def zarr_image(value: tuple[int, bytes, bytes | None]) -> None:
    """A whole image with any chunk, or any bytes for its document, through listing and loading."""
    which, chunk, document = value
    with tempfile.TemporaryDirectory() as folder:
        top = write_group(Path(folder) / "a.zarr", image_attributes("yx"))
        (top / "0" / "c" / "0").mkdir(parents=True)
        name, key = (".zarray", "0.0") if which < 6 else ("zarr.json", "c/0/0")
        (top / "0" / name).write_bytes(ARRAYS[which][0] if document is None else document)
        (top / "0" / key).write_bytes(chunk)
        for item in list_items([str(top)]).items:
            assert load_item(item, LIMITS).image.pixels.nbytes <= LIMITS.max_bytes


ZARR_IMAGES = st.one_of([st.tuples(st.just(i), mutated(chunk), st.none() | mutated(document))
                         for i, (document, chunk) in enumerate(ARRAYS)])

# ---- jobs, records, weights

JOB = {"sources": ["a"], "out": "o", "where": {"Plate": "x"}, "layers": [1], "channels": "each", "limit": 3, "workers": "1,2",
       "model": "vits16", "features": ["cls"], "resize_px": 224, "precision": "float32"}


@only(BadRequest)
def job_file(text: str) -> None:
    """Any text as a job's YAML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j.yaml"
        path.write_text(text, errors="surrogateescape")
        build_job(ExtractImagesJob, read_job_file(path, ["limit=2"]))


RECEIPT = Receipt("u", 0, "f", "P", [StoredObject("k", 1, "0" * 64)], 2, 1, 1, 1, {"nan": 1}, {"wall": 1.5}, 3, {"rss_peak": 4},
                  {"degraded": False, "device_kind": "cpu"}, 1, {"host": "h"})


@only(OutputDamaged)
def receipt(text: bytes) -> None:
    """Any bytes as a receipt."""
    found = Ledger(DictStore({"_dinoray/receipts/u.json": text})).receipt("u")
    Tally().add(found)
    found.to_json()


def plan_objects() -> dict[str, bytes]:
    """The files of a small plan."""
    store = DictStore()
    make_plan(store, [make_item(f"i{n}.png", metadata={"Metadata_Plate": "P"}) for n in range(4)], metadata_columns=[])
    return store.objects


PLAN = plan_objects()


@only(OutputDamaged)
def plan(value: tuple[str, bytes]) -> None:
    """A plan of which one file is any bytes."""
    found = Plan(DictStore(PLAN | {value[0]: value[1]}))
    assert sum(len(unit.items) for unit in found.units()) == found.num_items


@only(WeightsError)
def safetensors(data: bytes) -> None:
    """Any bytes as a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        reader = TensorReader(find(Path(folder)))
        for name in reader.shapes:
            reader.read(name)


@only(WeightsError)
def safetensors_index(value: Any) -> None:
    """Any JSON as the index of sharded weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(value))
        find(Path(folder))


WEIGHTS = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})
HEADER = json.loads(WEIGHTS[8:8 + int.from_bytes(WEIGHTS[:8], "little")])


def with_header(value: Any) -> bytes:
    """The weights behind another header."""
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + WEIGHTS[-32:]


REGEX_TEXT = st.text(alphabet="()[]{}?*+|\\.^$<>P=!:chanelw0-9,/a", max_size=25)
PROPERTIES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None], int]] = {
    "tiff description": (st.one_of(OME_XML, OME_XML, IMAGEJ, SHAPED, OTHERS), tiff_description, 200),
    "ome xml": (st.one_of(OME_XML, OME_XML.flatmap(lambda text: mutated(text.encode())).map(lambda b: b.decode("latin-1"))),
                ome_xml, 300),
    "pattern": (st.one_of(REGEX_TEXT, REGEX_TEXT.map(lambda t: f"(?P<channel>w){t}")), pattern, 300),
    "parquet manifest": (mutated(parquet(TABLE), parquet(TABLE, compression="none"), parquet(LOADDATA)),
                         table_of(".parquet"), 300),
    "csv LoadData": (mutated(b'FileName_OrigDNA,PathName_OrigDNA,Metadata_Plate\na.tif,/x,"P\n"\nb,,\n'), table_of(".csv"), 150),
    "cell": (st.one_of(st.text(max_size=20), st.lists(st.sampled_from(
        ["file:", "//", "/", "..", "s3://", "b", "::", "zip", "@", "u:p", "\\", "C:", "~", "%2e", "http://", "\0", "?", "#"]),
        max_size=7).map("".join)), cell, 500),
    "zarr group": (st.one_of(JSON, changed(*GROUPS)), zarr_group, 400),
    "zarr array": (st.one_of(JSON, changed(*(json.loads(document) for document, _ in ARRAYS))), zarr_array, 400),
    "zarr image": (ZARR_IMAGES, zarr_image, 300),
    "job file": (st.one_of(changed(JOB).map(lambda v: yaml.safe_dump(v, allow_unicode=True)), mutated(yaml.safe_dump(JOB).encode())
                           .map(lambda b: b.decode("utf-8", "surrogateescape")), st.text(max_size=30)), job_file, 200),
    "receipt": (st.one_of(changed(json.loads(RECEIPT.to_json())).map(lambda v: json.dumps(v).encode()),
                          mutated(RECEIPT.to_json().encode())), receipt, 300),
    "plan": (st.one_of([st.tuples(st.just(key), mutated(data)) for key, data in PLAN.items()]), plan, 300),
    "safetensors": (st.one_of(mutated(WEIGHTS), changed(HEADER).map(with_header)), safetensors, 200),
    "safetensors index": (st.one_of(JSON, changed({"weight_map": {"a": "x.safetensors", "b": "../y"}})), safetensors_index, 100),
}


def run(name: str, times: int) -> None:
    """The property `name` over `times` its number of examples."""
    strategy, check, examples = PROPERTIES[name]

    @settings(max_examples=examples * times, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def holds(value: Any) -> None:
        check(value)

    holds()


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("name", PROPERTIES)
def test_only_typed_errors_come_out(name: str) -> None:
    run(name, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("name", PROPERTIES)
def test_only_typed_errors_come_out_of_many(name: str) -> None:
    run(name, 8)
