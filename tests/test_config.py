"""Jobs: validated before anything runs, every problem named with its field, and hashed by what changes results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dinoray.config import (
    EXECUTION_FIELDS,
    ExtractCellsJob,
    ExtractImagesJob,
    ExtractVolumeJob,
    SegmentCellsJob,
    TrainDistanceMapJob,
    build_job,
    canonical_json,
    channel_groups,
    read_job_file,
    without_secrets,
)
from dinoray.errors import BadRequest

BASE = {"sources": ("in",), "out": "out"}


def job(**values: object) -> ExtractImagesJob:
    return build_job(ExtractImagesJob, {**BASE, **values})


@pytest.mark.parametrize(("values", "needle"), [
    ({"sources": ()}, "sources"),
    ({"unknown_field": 1}, "unknown_field"),
    ({"limit": 0}, "limit"),
    ({"unit_items": 0}, "unit_items"),
    ({"features": "cls,cls"}, "once"),
    ({"features": "cls,"}, "features"),
    ({"features": ()}, "features"),
    ({"features": "CLS"}, "features"),
    ({"layers": "1,1"}, "layers"),
    ({"layers": "-1"}, "layers"),
    ({"layers": "a"}, "layers"),
    ({"workers": "0"}, "workers"),
    ({"workers": "4,2"}, "workers"),
    ({"workers": "2,"}, "workers"),
    ({"workers": [1, 2, 3]}, "workers"),
    ({"workers": True}, "workers"),
    ({"channels": "x=a,b"}, "channels"),
    ({"channels": "x=a,b,"}, "channels"),
    ({"channels": "=a,b,c"}, "channels"),
    ({"channels": "x=a,b,c;x=d,e,f"}, "channels"),
    ({"channels": "x=a,b,c;"}, "channels"),
    ({"scaling_low_percent": 99.9}, "scaling_low_percent"),
    ({"scaling_low_percent": 50, "scaling_high_percent": 50}, "scaling_low_percent"),
    ({"scaling_high_percent": 100.5}, "scaling_high_percent"),
    ({"max_failed_fraction": 1.5}, "max_failed_fraction"),
    ({"precision": "float16"}, "precision"),
    ({"size": "crop"}, "size"),
    ({"where": {"Plate": 7}}, "where"),
    ({"pixel_size_um": 0}, "pixel_size_um"),
    ({"pixel_size_um": float("nan")}, "pixel_size_um"),
    ({"pixel_size_um": float("inf")}, "pixel_size_um"),
    ({"clahe_tile_um": float("inf")}, "clahe_tile_um"),
    ({"scaling_low_percent": float("nan")}, "scaling_low_percent"),
    ({"clahe_clip": 1}, "clahe_clip"),
    ({"tile_px": 16}, "tile_px"),
])
def test_bad_values_are_named_with_their_field(values: dict, needle: str) -> None:
    with pytest.raises(BadRequest) as caught:
        job(**values)
    if needle in ExtractImagesJob.model_fields and needle != "sources":
        needle = "--" + needle.replace("_", "-")
    assert needle in caught.value.what and "job:" not in caught.value.what
    assert ("unit_items" in caught.value.todo) == ("unknown_field" in values), "the list of fields only for one that is none"
    assert "--help" in caught.value.todo or "unknown_field" in values


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(BadRequest) as caught:
        job(limit=0, size="crop", nonsense=1)
    assert all(name in caught.value.what for name in ("limit", "size", "nonsense"))


def test_a_missing_out_is_named() -> None:
    with pytest.raises(BadRequest, match="out: "):
        build_job(ExtractImagesJob, {"sources": ["in"]})


@pytest.mark.parametrize(("values", "field", "expected"), [
    ({"sources": "one"}, "sources", ("one",)),
    ({"features": "cls, patches"}, "features", ("cls", "patches")),
    ({"layers": "5, 11"}, "layers", (5, 11)),
    ({"layers": 0}, "layers", (0,)),
    ({"layers": [5]}, "layers", (5,)),
    ({"layers": []}, "layers", None),
    ({"workers": 3}, "workers", "3"),
    ({"workers": [1, 4]}, "workers", "1,4"),
    ({"workers": "auto"}, "workers", "auto"),
])
def test_convenient_forms(values: dict, field: str, expected: object) -> None:
    assert getattr(job(**values), field) == expected


def test_a_job_is_frozen_and_every_field_is_described() -> None:
    with pytest.raises(ValidationError):
        job().limit = 3  # type: ignore[misc]
    for name, field in ExtractImagesJob.model_fields.items():
        assert field.description, f"{name} has no docstring"


def test_defaults_of_the_contract() -> None:
    values = job()
    assert (values.features, values.layers, values.size, values.tile_px) == (("cls", "patch_mean"), None, "auto", 256)
    assert (values.unit_items, values.unit_bytes, values.max_failed_fraction) == (256, 10**9, 0.1)
    assert (values.scaling_low_percent, values.scaling_high_percent, values.contrast) == (0.1, 99.9, "none")


def test_result_settings_are_all_fields_but_how_it_runs() -> None:
    settings_ = job().result_settings()
    fields = {*ExtractImagesJob.model_fields, *ExtractCellsJob.model_fields, *ExtractVolumeJob.model_fields,
              *SegmentCellsJob.model_fields}
    assert fields >= EXECUTION_FIELDS, "a name in EXECUTION_FIELDS is no field"
    assert set(settings_) == set(ExtractImagesJob.model_fields) - EXECUTION_FIELDS
    assert json.loads(canonical_json(settings_)) == settings_
    changed = job(workers="7", no_ray=True, rounds=9, decode_threads=3, max_failed_fraction=0.5, strict=True)
    assert changed.result_settings() == settings_
    for name, value in {"size": "native", "layers": (1,), "limit": 5, "where": {"Plate": "a"}, "tile_px": 512,
                        "precision": "float32", "unit_items": 3, "vector_dtype": "float16"}.items():
        assert job(**{name: value}).result_settings() != settings_, name


NAMES = st.text(st.characters(blacklist_characters=",;=", blacklist_categories=("Cs", "Cc")), min_size=1).map(
    str.strip).filter(bool)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.tuples(NAMES, NAMES, NAMES), min_size=1, max_size=4))
def test_channel_groups_round_trip(groups: dict) -> None:
    text = ";".join(f"{name} = {', '.join(members)}" for name, members in groups.items())
    assert channel_groups(text) == groups
    assert list(channel_groups(text) or ()) == list(groups)


@pytest.mark.parametrize("policy", ["auto", "rgb", "mean", "each"])
def test_plain_policies_have_no_groups(policy: str) -> None:
    assert channel_groups(policy) is None


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(max_size=5), lambda x: st.lists(x, max_size=2) |
                    st.dictionaries(st.text(max_size=5), x, max_size=2), max_leaves=5)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_canonical_json_ignores_the_order_of_keys(value: dict) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(value) != canonical_json({**value, "one more key": 1})


# ---------------------------------------------------------------- job files


def test_job_file_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "jöb.yaml"
    file.write_text(yaml.safe_dump({"sources": ["a"], "out": "o", "where": {"Plate": "BR*"}, "limit": 3},
                                   allow_unicode=True))
    values = read_job_file(file, ["limit=7", "layers=[5, 11]", "out=a=b", "where={Well: A01}", "no_ray=true"])
    assert values == {"sources": ["a"], "out": "a=b", "where": {"Well": "A01"}, "limit": 7, "layers": [5, 11],
                      "no_ray": True}
    built = build_job(ExtractImagesJob, values)
    assert (built.layers, built.no_ray, built.where) == ((5, 11), True, {"Well": "A01"})


@pytest.mark.parametrize("content", [
    "- a\n- b\n", "", "just text", "a: [1, 2", "a: !!python/object/apply:os.system ['true']", "day: 2024-13-45", "\0",
])
def test_a_file_that_is_no_job(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(BadRequest) as caught:
        read_job_file(file)
    assert str(file) in str(caught.value)


def test_missing_and_binary_job_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("none.yaml", "b.yaml", "."):
        with pytest.raises(BadRequest, match="job file"):
            read_job_file(tmp_path / name)


@pytest.mark.parametrize("override", ["limit", "limit=[1", "day=2024-13-45", ""])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("out: o")
    with pytest.raises(BadRequest, match="not an override"):
        read_job_file(file, [override])


def training(**values: object) -> TrainDistanceMapJob:
    return build_job(TrainDistanceMapJob, {"train": [{"images": "in"}], "out": "o", "model": "vits16", **values})


def test_an_override_may_lead_into_a_field(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"train": [{"images": "in"}], "out": "o", "model": "vits16", "where": None}))
    values = read_job_file(file, ["augmentation.p_rotate=0", "augmentation.flips=false", "train.0.weight=2.5", "where.Plate=A"])
    assert values.pop("where") == {"Plate": "A"}
    built = build_job(TrainDistanceMapJob, values)
    assert (built.augmentation.p_rotate, built.augmentation.flips, built.train[0].weight) == (0, False, 2.5)
    for override in ("train.1.weight=2", "train.x=2", "out.a=1", "train.0.images.a=1"):
        with pytest.raises(BadRequest, match="not an override"):
            read_job_file(file, [override])


def test_a_wrong_inner_field_is_told_alone_and_with_the_fields_beside_it() -> None:
    with pytest.raises(BadRequest) as caught:
        training(augmentation={"p_rotatee": 0})
    assert caught.value.todo.startswith("fields of augmentation: flips, p_rotate, ") and "out" not in caught.value.todo.split(", ")
    with pytest.raises(BadRequest) as caught:
        training(train=[{"images": "in", "weights": 1}], nonsense=1)
    assert "fields of train.0: images, labels, " in caught.value.todo and "fields: out, " in caught.value.todo
    with pytest.raises(BadRequest) as caught:
        training(train=[{"images": "in", "weight": -1}])
    assert [line.split(":")[0] for line in caught.value.what.splitlines()[1:]] == ["  train.0.weight"]


@pytest.mark.parametrize(("written", "kept"), [(1, "1"), ("1", "1"), ("DNA", "DNA")])
def test_the_channels_of_a_training_may_be_a_number(written: object, kept: str) -> None:
    assert training(channels=written).channels == kept


@pytest.mark.parametrize("key", ["on", "1", "null", "2.5"])
def test_yaml_keys_that_are_no_text(tmp_path: Path, key: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"out: o\nsources: [a]\n{key}: 3\n")
    with pytest.raises(BadRequest, match="not valid"):
        build_job(ExtractImagesJob, read_job_file(file))


@pytest.mark.parametrize("field", ["sources", "out", "staging"])
def test_credentials_in_a_url_are_refused_without_repeating_them(field: str) -> None:
    values = {"sources": ["in"], "out": "out", field: "s3://KEY:topsecret@bucket/x"}
    with pytest.raises(BadRequest) as refusal:
        build_job(ExtractImagesJob, values)
    assert "password" in str(refusal.value) and "topsecret" not in str(refusal.value)


@pytest.mark.parametrize("query", ["X-Amz-Signature=0badc0de", "x=1&X-Amz-Security-Token=0badc0de", "sv=1&sig=0badc0de",
                                   "access_token=0badc0de", "AWSAccessKeyId=0badc0de&Expires=1", "api_key=0badc0de",
                                   "X-Goog-Signature=0badc0de", "Key-Pair-Id=0badc0de", "a=b;password=0badc0de"])
@pytest.mark.parametrize("field", ["sources", "out", "weights", "staging"])
def test_presigned_urls_are_refused_and_not_repeated(query, field):
    values = {"sources": ["in"], "out": "out", field: f"https://host/a.tif?{query}"}
    with pytest.raises(BadRequest) as refusal:
        build_job(ExtractImagesJob, values)
    assert "a secret (" in str(refusal.value) and "0badc0de" not in str(refusal.value)
    assert "0badc0de" not in without_secrets(f"GET https://host/a.tif?{query} failed")


@pytest.mark.parametrize("url", ["https://host/a.tif?id=3&author=me", "s3://bucket/token=3/a.tif", "plate?/*.tif",
                                 "/data/sig=?.tif", "https://host/monkey=1?page=2", "gs://b/secret/a.tif"])
def test_urls_without_secrets_are_accepted(url):
    assert build_job(ExtractImagesJob, {"sources": [url], "out": "out"}).sources == (url,)
    assert without_secrets(url) == url
