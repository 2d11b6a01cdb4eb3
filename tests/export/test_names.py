"""Column names: unique, plain, and found by pycytominer."""

from __future__ import annotations

import re

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from pycytominer.cyto_utils import infer_cp_features

from dinoray.export.names import channel_labels, feature_names


@given(st.lists(st.text(max_size=6), max_size=8, unique=True))
def test_labels_are_unique_and_plain(channels: list[str]) -> None:
    labels = channel_labels(channels)
    assert len(set(labels)) == len(channels)
    assert all(re.fullmatch(r"[A-Za-z0-9]+", label) for label in labels)


def test_names_of_the_contract() -> None:
    assert channel_labels(["DNA", "ch-1", "ch1", "中", "é", "DAPI (405 nm)"]) == [
        "DNA", "ch1", "ch1x2", "channel", "channelx2", "DAPI405nm"]
    names = feature_names("Image", "vits16", ["DNA", "ER"], [("cls", 2), ("patch_mean_l05", 1)])
    assert names == ["Image_dinov3_vits16_DNA_cls_0000", "Image_dinov3_vits16_DNA_cls_0001",
                     "Image_dinov3_vits16_DNA_patch_mean_l05_0000", "Image_dinov3_vits16_ER_cls_0000",
                     "Image_dinov3_vits16_ER_cls_0001", "Image_dinov3_vits16_ER_patch_mean_l05_0000"]


def test_pycytominer_finds_them() -> None:
    for compartment in ("Image", "Cells", "Nuclei", "Cytoplasm"):
        names = feature_names(compartment, "vits16", ["DNA"], [("cls", 3)])
        frame = pd.DataFrame(0.0, index=[0], columns=["Metadata_Plate", "Metadata_QC_DNA_p50", *names])
        assert infer_cp_features(frame, image_features=compartment == "Image") == names
