"""What a segmentation network gets: the chosen channels in [0, 1], colours in their ratio, dark 8-bit RGB bright."""

from __future__ import annotations

import numpy as np
import pytest

from dinoray.errors import BadRequest, ItemError
from dinoray.io.decoded import DecodedImage, Limits
from dinoray.io.raster import decode_png
from dinoray.vision.segmentation_input import planes
from tests.conftest import texture
from tests.realdata import data_folder

FIVE = ("DNA", "ER", "RNA", "AGP", "Mito")


def five(dtype: str = "uint16") -> DecodedImage:
    return DecodedImage(texture((5, 60, 70), 3, dtype), FIVE)


def rgb8(pixels: np.ndarray) -> DecodedImage:
    return DecodedImage(pixels, None, None, True)


def scaled(plane: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((plane.astype(np.float64) - low) / (high - low), 0, 1)


def own(plane: np.ndarray) -> np.ndarray:
    return scaled(plane, *np.percentile(plane.astype(np.float64), (0.1, 99.9)))


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_one_channel_is_repeated(dtype: str) -> None:
    pixels = (texture((1, 60, 70), 1, "uint16") / (1 if "float" not in dtype else 7)).astype(dtype)
    out = planes(DecodedImage(pixels))
    assert (out.shape, out.dtype) == ((3, 60, 70), np.float32)
    assert out.flags.c_contiguous and out.flags.writeable
    for k in range(3):
        np.testing.assert_allclose(out[k], own(pixels[0]), atol=1e-6)
    assert (out.min(), out.max()) == (0, 1)
    assert planes(DecodedImage(pixels)).tobytes() == out.tobytes()


@pytest.mark.parametrize(("channels", "index"), [("DNA", 0), ("Mito", 4), ("0", 0), ("3", 3)])
def test_a_channel_by_name_or_number(channels: str, index: int) -> None:
    image = five()
    out = planes(image, channels=channels)
    for k in range(3):
        np.testing.assert_allclose(out[k], own(image.pixels[index]), atol=1e-6)


def test_a_name_goes_before_a_number() -> None:
    image = DecodedImage(texture((2, 40, 40), 3, "uint16"), ("1", "0"))
    np.testing.assert_allclose(planes(image, channels="1")[0], own(image.pixels[0]), atol=1e-6)


def test_groups_and_the_mean_scale_each_channel_by_itself() -> None:
    image = five()
    out = planes(image, channels="x=Mito,DNA,DNA")
    for k, i in enumerate((4, 0, 0)):
        np.testing.assert_allclose(out[k], own(image.pixels[i]), atol=1e-6)
    mean = np.mean([own(p) for p in image.pixels], axis=0)
    out = planes(image, channels="mean")
    for k in range(3):
        np.testing.assert_allclose(out[k], mean, atol=1e-6)


@pytest.mark.parametrize(("channels", "needles"), [
    ("auto", ["5 channels", "DNA, ER", "which one", "--channel DNA", "channels: DNA"]),
    ("rgb", ["5 channels", "rgb needs 3"]),
    ("GFP", ["no channel GFP", "DNA, ER"]),
    ("5", ["no channel 5"]),
    ("-1", ["no channel -1"]),
    ("x=DNA,ER,GFP", ["no channel GFP", "group x"]),
])
def test_a_channel_that_is_not_there_is_named(channels: str, needles: list[str]) -> None:
    with pytest.raises(ItemError) as caught:
        planes(five(), channels=channels)
    assert caught.value.reason == "channel_count"
    for needle in needles:
        assert needle in str(caught.value)


@pytest.mark.parametrize("channels", ["x=DNA,ER", "x=DNA,ER,AGP;y=DNA,ER,AGP", "=a,b,c"])
def test_a_group_that_is_not_one_of_three_is_a_bad_request(channels: str) -> None:
    with pytest.raises(BadRequest, match="channels"):
        planes(five(), channels=channels)
    with pytest.raises(BadRequest, match="scaling"):
        planes(five(), channels="DNA", scaling="percentile")


# ---------------------------------------------------------------- colour


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_colours_keep_their_ratio(dtype: str) -> None:
    """One (low, high) for the three channels: a blue nucleus stays blue, however dark it is."""
    pixels = np.concatenate([texture((1, 50, 50), s, "uint16") for s in range(3)]) / 65535 * 20
    pixels = (pixels * np.array([0.2, 0.5, 1.0])[:, None, None] + (0 if dtype == "float32" else 1)).astype(dtype)
    image = DecodedImage(pixels, ("a", "b", "c"), None, dtype == "uint8")
    low, high = np.percentile(pixels.astype(np.float64), (0.1, 99.9))
    for channels in ("rgb", "auto") if dtype == "uint8" else ("rgb",):
        out = planes(image, channels=channels)
        np.testing.assert_allclose(out, scaled(pixels, low, high), atol=1e-6)
    assert out[2].max() == 1
    assert out[0].max() < 0.3


def test_dark_8_bit_rgb_comes_out_bright() -> None:
    dark = texture((1, 80, 80), 2) // 20  # values up to 12 of 255
    out = planes(rgb8(np.repeat(dark, 3, 0)))
    np.testing.assert_allclose(out[0], own(dark[0]), atol=1e-6)
    assert np.array_equal(out[0], out[2])
    assert out.max() == 1
    np.testing.assert_allclose(planes(rgb8(np.repeat(dark, 3, 0)), scaling="dtype")[1], dark[0] / 255, atol=1e-6)
    single = texture((3, 40, 40), 2)
    np.testing.assert_allclose(planes(rgb8(single), channels="G")[0], own(single[1]), atol=1e-6)
    low, high = np.percentile(single.astype(float), (0.1, 99.9))
    np.testing.assert_allclose(planes(rgb8(single), channels="mean")[0], scaled(single, low, high).mean(0), atol=1e-6)


def test_a_colour_group_that_is_called_rgb_is_still_a_group() -> None:
    image = five()
    np.testing.assert_allclose(planes(image, channels="rgb=DNA,ER,AGP")[1], own(image.pixels[1]), atol=1e-6)


# ---------------------------------------------------------------- scaling


def test_scaling_by_the_plate_and_by_the_dtype() -> None:
    image = five()
    table = {"p": {"DNA": (100.0, 5000.0), "ER": (0.0, 9.0)}}
    out = planes(image, channels="DNA", scaling="plate", group="p", table=table)
    np.testing.assert_allclose(out[0], scaled(image.pixels[0], 100, 5000), atol=1e-6)
    np.testing.assert_allclose(planes(image, channels="ER", scaling="dtype")[0], image.pixels[1] / 65535, atol=1e-6)
    colour = DecodedImage(texture((3, 30, 30), 1).astype(np.uint16) // 2, ("R", "G", "B"))
    table = {"p": {"R": (5.0, 50.0), "G": (1.0, 90.0), "B": (3.0, 40.0)}}
    out = planes(colour, channels="rgb", scaling="plate", group="p", table=table)
    np.testing.assert_allclose(out, scaled(colour.pixels, 1, 90), atol=1e-6)
    for group, which in (("q", "DNA"), ("p", "Mito")):
        with pytest.raises(ItemError) as caught:
            planes(image, channels=which, scaling="plate", group=group, table={"p": {"DNA": (0.0, 1.0)}})
        assert caught.value.reason == "no_scaling"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_black(dtype: str, value: int) -> None:
    for image in (DecodedImage(np.full((1, 9, 9), value, dtype)), DecodedImage(np.full((3, 9, 9), value, dtype), is_rgb8=True)):
        assert not planes(image).any()


def test_the_percents_are_those_asked_for() -> None:
    pixels = np.arange(10_000, dtype=np.uint16).reshape(1, 100, 100)
    out = planes(DecodedImage(pixels), percents=(10, 60))
    np.testing.assert_allclose(out[0], scaled(pixels[0], *np.percentile(pixels, (10, 60))), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_a_used_channel_is_refused(bad: float) -> None:
    pixels = np.random.default_rng(0).random((2, 8, 8)).astype(np.float32)
    pixels[1, 3, 3] = bad
    image = DecodedImage(pixels, ("a", "b"))
    for channels in ("b", "mean"):
        with pytest.raises(ItemError) as caught:
            planes(image, channels=channels)
        assert caught.value.reason == "nan"
    assert np.isfinite(planes(image, channels="a")).all()


def test_real_fluorescence_saved_in_colour_is_bright_and_stained_tissue_keeps_its_colour() -> None:
    folder = data_folder("dsb2018_stage1") / "stage1_train"
    kinds = set()
    for path in sorted(folder.glob("*/images/*.png"))[::6]:
        image = decode_png(path.read_bytes(), path.name, Limits())
        assert image.is_rgb8
        out = planes(image)
        assert (out.min(), out.max()) == (0, 1)
        is_grey = np.array_equal(image.pixels[0], image.pixels[1])
        kinds.add((is_grey, int(image.pixels.max()) < 100))
        if is_grey:
            assert np.array_equal(out[0], out[2])
        inside = (out > 0) & (out < 1)  # what no percentile cuts: one straight line for the three channels
        slope, offset = np.polyfit(image.pixels[inside].astype(float), out[inside], 1)
        assert np.abs(slope * image.pixels[inside] + offset - out[inside]).max() < 1e-5
    assert {(True, True), (False, False)} <= kinds
