"""dinoray.io.images: every format to image_CYX in its own dtype, and every damage to one ItemError."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoray.errors import ItemError, SystemicError, TransientError
from dinoray.io import stores
from dinoray.io.images import DecodedImage, Limits, decode_image, load_item
from dinoray.io.items import FileRef, Item
from dinoray.io.walk import RemoteTree
from tests.realdata import data_folder

RNG = np.random.default_rng(0)
U8 = RNG.integers(0, 255, (37, 53), dtype=np.uint8)
U16 = RNG.integers(0, 65535, (37, 53), dtype=np.uint16)
RGB = RNG.integers(0, 255, (37, 53, 3), dtype=np.uint8)


def tiff(array, **kwargs) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **kwargs)
    return out.getvalue()


def pages(*arrays, **kwargs) -> bytes:
    """A plain multi-page TIFF without any metadata."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out, **kwargs) as writer:
        for array in arrays:
            writer.write(array, contiguous=False, metadata=None)
    return out.getvalue()


def pil(array, kind, mode=None, **kwargs) -> bytes:
    out = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, kind, **kwargs)
    return out.getvalue()


def decode(data, **kwargs) -> DecodedImage:
    image = decode_image(data, "x", **kwargs)
    assert image.pixels.ndim == 3 and image.pixels.flags.c_contiguous and image.pixels.dtype.isnative
    return image


def reason(data, limits=None, uri="folder/x.tif", **kwargs) -> str:
    with pytest.raises(ItemError) as caught:
        decode_image(data, uri, limits, **kwargs)
    assert uri in str(caught.value)
    return caught.value.reason


# ---- TIFF


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_keeps_dtype_and_values(dtype, order):
    array = (U16 % 100).astype(dtype)
    image = decode(tiff(array, byteorder=order))
    assert image.pixels.dtype == np.dtype(dtype) and not image.is_rgb8
    np.testing.assert_array_equal(image.pixels[0], array)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits", "lzma", "jpeg2000"])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 32)}, {"rowsperstrip": 5}, {"bigtiff": True}])
def test_tiff_compressions_and_layouts_are_lossless(compression, layout):
    if compression == "jpeg2000":
        layout = {"compressionargs": {"reversible": True}} | layout
    if compression in ("lzw", "zlib", "zstd"):
        layout = {"predictor": True} | layout
    image = decode(tiff(U16, compression=compression, **layout))
    np.testing.assert_array_equal(image.pixels[0], U16)


def test_tiff_jpeg_compressed_colour():
    image = decode(
        tiff(np.full((64, 48, 3), (200, 100, 50), np.uint8), compression="jpeg", tile=(32, 32), photometric="rgb")
    )
    assert image.is_rgb8 and np.abs(image.pixels.mean((1, 2)) - (200, 100, 50)).max() < 3


def test_tiff_bool_becomes_uint8():
    image = decode(tiff(U8 > 127))
    assert image.pixels.dtype == np.uint8
    np.testing.assert_array_equal(image.pixels[0], np.where(U8 > 127, 255, 0))  # as a PNG of 1 bit


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_colour(planar):
    array = RGB if planar == "contig" else RGB.transpose(2, 0, 1)
    image = decode(tiff(array, photometric="rgb", planarconfig=planar))
    assert image.is_rgb8
    np.testing.assert_array_equal(image.pixels, RGB.transpose(2, 0, 1))


def test_tiff_16_bit_colour_is_three_channels_but_no_photo():
    array = RGB.astype(np.uint16) * 257
    image = decode(tiff(array, photometric="rgb"))
    assert not image.is_rgb8 and image.pixels.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, array.transpose(2, 0, 1))


def test_tiff_alpha_is_dropped_and_infrared_is_not():
    rgba = np.dstack([RGB, U8])
    with_alpha = decode(tiff(rgba, photometric="rgb", extrasamples=["unassalpha"]))
    assert with_alpha.is_rgb8
    np.testing.assert_array_equal(with_alpha.pixels, RGB.transpose(2, 0, 1))
    infrared = decode(tiff(rgba, photometric="rgb", extrasamples=["unspecified"]))
    assert not infrared.is_rgb8
    np.testing.assert_array_equal(infrared.pixels, rgba.transpose(2, 0, 1))


def test_tiff_palette_is_colour_in_plain_files_and_display_in_imagej():
    lut = np.zeros((3, 256), np.uint16)
    lut[1] = np.arange(256) * 257  # green
    image = decode(tiff(U8, photometric="palette", colormap=lut, metadata=None))
    assert image.is_rgb8
    np.testing.assert_array_equal(image.pixels, [U8 * 0, U8, U8 * 0])
    from_imagej = decode(tiff(U8, photometric="palette", colormap=lut, metadata=None, description="ImageJ=1.53\n"))
    np.testing.assert_array_equal(from_imagej.pixels, U8[None])


def test_plain_pages_are_channels():
    image = decode(pages(U16, U16 // 2, U16 // 3))
    np.testing.assert_array_equal(image.pixels, [U16, U16 // 2, U16 // 3])
    assert image.channel_names is None
    np.testing.assert_array_equal(decode(tiff(np.stack([U16, U16 // 2]))).pixels, [U16, U16 // 2])


def test_pages_of_different_shapes_are_refused_but_thumbnails_are_left_out():
    assert reason(pages(U16, U16[:10, :10])) == "stack"
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(U16, metadata=None)
        writer.write(U16[::2, ::2], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(decode(out.getvalue()).pixels, U16[None])


def test_colour_pages_are_a_stack():
    assert reason(pages(RGB, RGB)) == "stack"


def test_ome_tiff_axes_names_and_pixel_size():
    array = np.stack([U16, U16 // 2, U16 // 3])
    meta = {
        "axes": "CYX",
        "Channel": {"Name": ["DNA", "ER", "Mito"]},
        "PhysicalSizeX": 598,
        "PhysicalSizeY": 598,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeYUnit": "nm",
    }
    image = decode(tiff(array, ome=True, metadata=meta))
    np.testing.assert_array_equal(image.pixels, array)
    assert image.channel_names == ("DNA", "ER", "Mito") and image.pixel_size_um == pytest.approx(0.598)


def test_ome_tiff_default_unit_is_um_and_anisotropy_is_not_a_size():
    meta = {"axes": "YX", "PhysicalSizeX": 0.65, "PhysicalSizeY": 0.65}
    assert decode(tiff(U16, ome=True, metadata=meta)).pixel_size_um == 0.65
    assert decode(tiff(U16, ome=True, metadata=meta | {"PhysicalSizeY": 1.3})).pixel_size_um is None


def test_ome_tiff_colour():
    image = decode(tiff(RGB, ome=True, photometric="rgb", metadata={"axes": "YXS"}))
    assert image.is_rgb8
    np.testing.assert_array_equal(image.pixels, RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX", "TCYX"])
@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
def test_stacks_are_refused_with_their_axes(axes, kind):
    array = RNG.integers(0, 999, (2, 3, 9, 8), dtype=np.uint16)
    if kind == "imagej" and axes == "CZYX":
        return  # ImageJ stores TZCYX only
    data = tiff(array, metadata={"axes": axes}, photometric="minisblack", **({} if kind == "shaped" else {kind: True}))
    with pytest.raises(ItemError) as caught:
        decode_image(data, "x")
    told = "ZCYX" if axes == "CZYX" and kind == "ome" else axes
    assert caught.value.reason == "stack" and told in str(caught.value) and "--z-projection" in caught.value.todo


@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
def test_z_projection(kind):
    array = RNG.integers(0, 999, (5, 3, 9, 8), dtype=np.uint16)
    data = tiff(array, metadata={"axes": "ZCYX"}, **({} if kind == "shaped" else {kind: True}))
    np.testing.assert_array_equal(decode(data, z_projection="max").pixels, array.max(0))
    np.testing.assert_array_equal(decode(data, z_projection="middle").pixels, array[2])
    time_data = tiff(array, metadata={"axes": "TCYX"}, **({} if kind == "shaped" else {kind: True}))
    assert reason(time_data, z_projection="max") == "stack"


def test_z_projection_finds_the_planes_in_either_order():
    array = RNG.integers(0, 999, (3, 5, 9, 8), dtype=np.uint16)
    data = tiff(array, ome=True, metadata={"axes": "CZYX"})
    np.testing.assert_array_equal(decode(data, z_projection="max").pixels, array.max(1))


def test_imagej_hyperstack_labels_and_micron():
    array = np.stack([U16, U16 // 2])
    meta = {"axes": "CYX", "unit": "micron", "Labels": ["DAPI", "GFP"]}
    image = decode(tiff(array, imagej=True, metadata=meta, resolution=(2.0, 2.0)))
    np.testing.assert_array_equal(image.pixels, array)
    assert image.channel_names == ("DAPI", "GFP") and image.pixel_size_um == pytest.approx(0.5)
    meta["unit"] = "inch"
    assert decode(tiff(array, imagej=True, metadata=meta, resolution=(72.0, 72.0))).pixel_size_um is None


def test_imagej_file_with_one_directory_for_all_planes():
    array = RNG.integers(0, 999, (4, 9, 8), dtype=np.uint16)
    data = tiff(array, imagej=True, metadata={"axes": "CYX"}, truncate=True)
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        assert len(tif.pages) == 1
    np.testing.assert_array_equal(decode(data).pixels, array)
    shaped = tiff(array, truncate=True, photometric="minisblack")
    np.testing.assert_array_equal(decode(shaped).pixels, array)
    with tifffile.TiffFile(io.BytesIO(shaped)) as tif:
        end = tif.pages[0].dataoffsets[0] + array.nbytes
    assert reason(shaped[: end - 1]) == "truncated"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("channels", [3, 4])
def test_channel_arrays_that_tifffile_tags_as_rgb_lose_no_channel(channels, dtype):
    array = RNG.integers(0, 255, (channels, 9, 8)).astype(dtype)
    named = decode(tiff(array, metadata={"axes": "CYX"}))
    np.testing.assert_array_equal(named.pixels, array)
    assert not named.is_rgb8
    plain = decode(tiff(array))
    np.testing.assert_array_equal(plain.pixels, array)
    assert plain.is_rgb8 == (channels == 3 and dtype == "u1")  # nothing says otherwise
    assert reason(tiff(array, metadata={"axes": "ZYX"})) == "stack"


def test_resolution_tags_alone_are_no_pixel_size():
    assert decode(tiff(U16, resolution=(72, 72), resolutionunit="inch")).pixel_size_um is None


OME = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:me">
<Image ID="Image:0"><Pixels DimensionOrder="{order}" Type="uint16" SizeX="{x}" SizeY="{y}" SizeC="{c}" SizeZ="{z}"
SizeT="{t}">{channels}{blocks}</Pixels></Image>{more}</OME>"""


def ome_file(*arrays, order="XYCZT", c=1, z=1, t=1, x=53, y=37, blocks="<TiffData/>", channels="", more="") -> bytes:
    xml = OME.format(order=order, c=c, z=z, t=t, x=x, y=y, blocks=blocks, channels=channels, more=more)
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for i, array in enumerate(arrays):
            writer.write(array, contiguous=False, metadata=None, description=xml.encode() if i == 0 else None)
    return out.getvalue()


def test_ome_blocks_place_pages():
    swapped = '<TiffData IFD="1" FirstC="0"/><TiffData IFD="0" FirstC="1"/>'
    data = ome_file(U16, U16 // 2, c=2, blocks=swapped)
    np.testing.assert_array_equal(decode(data).pixels, [U16 // 2, U16])


def test_ome_file_of_a_set_gives_its_own_planes_only():
    blocks = (
        '<TiffData FirstC="0" IFD="0"><UUID FileName="a.tif">urn:uuid:other</UUID></TiffData>'
        '<TiffData FirstC="1" IFD="0"><UUID FileName="b.tif">urn:uuid:me</UUID></TiffData>'
    )
    names = '<Channel Name="DNA"/><Channel Name="ER"/>'
    image = decode(ome_file(U16, c=2, blocks=blocks, channels=names))
    np.testing.assert_array_equal(image.pixels, U16[None])
    assert image.channel_names == ("ER",)


def test_ome_never_opens_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tif").write_bytes(tiff(U16))
    blocks = (
        '<TiffData FirstC="0" IFD="0"><UUID FileName="a.tif">urn:uuid:other</UUID></TiffData>'
        '<TiffData FirstC="1" IFD="0"><UUID FileName="b.tif">urn:uuid:me</UUID></TiffData>'
    )
    assert len(decode(ome_file(U16 // 2, c=2, blocks=blocks)).pixels) == 1


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"c": 3}, "truncated"),  # three planes promised, one page
        ({"c": 10**9, "z": 10**9}, "truncated"),
        ({"x": 60000, "y": 60000}, "too_large"),
        ({"x": 54}, "decode"),  # the page says otherwise
        ({"order": "XYQQQ"}, "decode"),
        ({"c": 0}, "decode"),
        ({"c": "many"}, "decode"),
        ({"blocks": '<TiffData IFD="-1"/>'}, "decode"),
        ({"blocks": '<TiffData FirstC="7"/>'}, "decode"),
        (
            {
                "more": '<Image ID="Image:1"><Pixels DimensionOrder="XYCZT" SizeX="53" SizeY="37" SizeC="1" SizeZ="1" '
                'SizeT="1"><TiffData/></Pixels></Image>'
            },
            "stack",
        ),
        ({"more": "<broken"}, "decode"),
    ],
)
def test_ome_lies(kwargs, expected):
    assert reason(ome_file(U16, **kwargs)) == expected


def test_ome_planes_with_holes_are_not_zeros():
    blocks = '<TiffData IFD="0" FirstC="0" FirstZ="0"/><TiffData IFD="1" FirstC="1" FirstZ="1"/>'
    assert reason(ome_file(U16, U16, c=2, z=2, blocks=blocks), z_projection="max") == "truncated"


def test_ome_entities_are_refused():
    xml = '<!DOCTYPE OME [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><OME>&b;</OME>'
    assert reason(tiff(U16, metadata=None, description=xml)) == "unsupported"


def test_ome_companion_file_with_several_pages_is_a_stack():
    xml = '<?xml version="1.0"?><OME><BinaryOnly MetadataFile="x.companion.ome" UUID="urn:uuid:x"/></OME>'
    assert len(decode(tiff(U16, metadata=None, description=xml)).pixels) == 1
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(U16, metadata=None, description=xml, contiguous=False)
        writer.write(U16, metadata=None, contiguous=False)
    assert reason(out.getvalue()) == "stack"


@pytest.mark.parametrize("photometric", ["separated", "cielab", "logluv"])
def test_tiff_colour_spaces_that_we_do_not_read(photometric):
    array = RNG.integers(0, 255, (8, 8, 4 if photometric == "separated" else 3), dtype=np.uint8)
    assert reason(tiff(array, photometric=photometric, metadata=None)) == "unsupported"


def test_tiff_complex_is_unsupported():
    assert reason(tiff(U16.astype(np.complex64))) == "unsupported"


def test_tiff_codec_whose_output_is_unbounded_is_unsupported():
    data = tiff(U8, compression="png")
    assert reason(data) == "unsupported"


# ---- PNG, JPEG and others


@pytest.mark.parametrize(
    "mode, shape", [("1", (1,)), ("L", (1,)), ("LA", (1,)), ("P", (3,)), ("RGB", (3,)), ("RGBA", (3,))]
)
def test_png_modes(mode, shape):
    image = decode(pil(RGB, "PNG", mode))
    assert image.pixels.shape == (*shape, 37, 53) and image.pixels.dtype == np.uint8
    assert image.is_rgb8 == (shape == (3,))
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(image.pixels, RGB.transpose(2, 0, 1))
    if mode == "1":
        assert set(np.unique(image.pixels)) == {0, 255}


def test_png_transparent_colour_is_no_channel():
    assert decode(pil(RGB, "PNG", transparency=(1, 2, 3))).pixels.shape == (3, 37, 53)
    assert decode(pil(U8, "PNG", transparency=3)).pixels.shape == (1, 37, 53)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_stays_16_bit(channels):
    array = RNG.integers(0, 65535, (37, 53, channels), dtype=np.uint16)
    array = array[..., 0] if channels == 1 else array
    image = decode(imagecodecs.png_encode(array))
    assert image.pixels.dtype == np.uint16 and not image.is_rgb8
    expected = array[None] if channels == 1 else array.transpose(2, 0, 1)
    np.testing.assert_array_equal(image.pixels, expected[: 3 if channels > 2 else 1])


def test_jpeg_modes():
    assert decode(pil(U8, "JPEG")).pixels.shape == (1, 37, 53)
    flat = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    for mode in ("RGB", "CMYK"):
        image = decode(pil(flat, "JPEG", mode, quality=95))
        assert image.is_rgb8 and np.abs(image.pixels.mean((1, 2)) - (200, 100, 50)).max() < 3


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(pil(RGB, "JPEG", exif=exif)).pixels.shape == (3, 37, 53)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP"])
def test_other_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(pil(RGB, kind, **options))
    assert image.pixels.shape == (3, 37, 53) and image.is_rgb8
    if kind != "GIF":
        np.testing.assert_array_equal(image.pixels, RGB.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_are_stacks(kind):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    assert reason(pil(frames[0], kind, save_all=True, append_images=frames[1:])) == "stack"


def test_the_format_is_told_by_content():
    assert decode_image(pil(RGB, "PNG"), "x.tif").is_rgb8
    assert decode_image(tiff(U16), "x.jpg").pixels.dtype == np.uint16


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "empty"),
        (b"hello, this is text", "not_image"),
        (b"\x89PN", "truncated"),
        (b"II", "truncated"),
        (b"II*\0", "truncated"),
        (b"<html>not found</html>", "not_image"),
        (b"\x89HDF\r\n\x1a\n" + b"0" * 99, "unsupported"),
        (b"ZISRAWFILE" + b"0" * 99, "unsupported"),
        (b"\0\0\0\x1cftypheic" + b"0" * 99, "unsupported"),
        (b"\xff\xd8\xff\xe0", "truncated"),
        (b"GIF89a", "decode"),
        (b"BM", "decode"),
        (b"II*\0" + b"\0" * 50, "decode"),
    ],
)
def test_reasons_of_what_is_no_image(data, expected):
    assert reason(data) == expected


# ---- truncation, limits, bombs

WHOLE = {
    "png": pil(RGB, "PNG"),
    "jpeg": pil(RGB, "JPEG"),
    "progressive": pil(RGB, "JPEG", progressive=True),
    "tiff": tiff(U16),
    "lzw": tiff(U16, compression="lzw", rowsperstrip=4),
    "ome": tiff(U16, ome=True),
    "tiled": tiff(U16, tile=(16, 16), compression="zlib"),
    "pages": pages(U16, U16, U16),
    "tiff jpeg": tiff(RGB, compression="jpeg", photometric="rgb"),
    "bigtiff": tiff(U16, bigtiff=True),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_truncation_is_noticed(kind):
    """No cut of a file gives pixels that differ from the whole file's."""
    data = WHOLE[kind]
    whole = decode(data).pixels
    for size in [*range(1, len(data), max(1, len(data) // 150)), len(data) - 1]:
        try:
            image = decode_image(data[:size], "x")
        except ItemError as error:
            assert error.reason in ("truncated", "decode"), (size, error)
        else:
            np.testing.assert_array_equal(image.pixels, whole, err_msg=f"{size} of {len(data)} bytes")
            assert size > len(data) - 64


def test_half_a_file_is_called_truncated():
    for kind, data in WHOLE.items():
        assert reason(data[: len(data) // 2]) == "truncated", kind


def test_missing_strips_are_not_black():
    data = bytearray(tiff(U16, compression="lzw", rowsperstrip=4))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tif:
        tag = tif.pages[0].tags["StripByteCounts"]
        struct.pack_into("<I" if tag.dtype == 4 else "<H", data, tag.valueoffset, 0)
    assert reason(bytes(data)) == "truncated"


def test_a_flipped_bit_in_a_png_is_noticed():
    data = bytearray(WHOLE["png"])
    data[len(data) // 2] ^= 1
    assert reason(bytes(data)) == "decode"


def test_a_jpeg_strip_that_is_cut_short_is_noticed():
    data = bytearray(WHOLE["tiff jpeg"])
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tif:
        tag = tif.pages[0].tags["StripByteCounts"]
        struct.pack_into({3: "<H", 4: "<I"}[tag.dtype], data, tag.valueoffset, tag.value[0] // 2)
    assert reason(bytes(data)) == "truncated"


def png_of(width, height, body=b"") -> bytes:
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body, 0)) + chunk(b"IEND", b"")


def test_a_changed_pixel_in_a_png_is_noticed_by_its_checksum():
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    data = bytearray(png_of(53, 37, rows))
    np.testing.assert_array_equal(decode(bytes(data)).pixels, RGB.transpose(2, 0, 1))
    data[bytes(data).index(RGB[20].tobytes())] ^= 1  # the stream inflates all the same
    assert reason(bytes(data)) == "decode"


def jpeg_of(width, height) -> bytes:
    data = bytearray(WHOLE["jpeg"])
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def tiff_of(width, height, **kwargs) -> bytes:
    """A small TIFF whose tags are then changed to declare width x height in one strip."""
    data = bytearray(tiff(U8, metadata=None, **kwargs))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tif:
        for name, value in {"ImageWidth": width, "ImageLength": height, "RowsPerStrip": height}.items():
            tag = tif.pages[0].tags[name]
            struct.pack_into({3: "<H", 4: "<I"}[tag.dtype], data, tag.valueoffset, value)
    return bytes(data)


def bombs():
    gif = bytearray(pil(U8, "GIF"))
    struct.pack_into("<HH", gif, 6, 60000, 60000)
    bmp = bytearray(pil(RGB, "BMP"))
    struct.pack_into("<ii", bmp, 18, 60000, 60000)
    tiles = bytearray(tiff(U8, tile=(16, 16), metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(tiles))) as tif:
        for name in ("TileWidth", "TileLength"):
            tag = tif.pages[0].tags[name]
            struct.pack_into({3: "<H", 4: "<I"}[tag.dtype], tiles, tag.valueoffset, 65520)
    return {
        "png": png_of(60000, 60000),
        "jpeg": jpeg_of(60000, 60000),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "tiff": tiff_of(60000, 60000),
        "tiff zlib": tiff_of(60000, 60000, compression="zlib"),
        "tiles": bytes(tiles),
        "long": png_of(2**31 - 1, 1),
        "deep": tiff(np.zeros((600, 4, 5), np.uint8), photometric="minisblack"),
        "samples": tiff(np.zeros((4, 4, 300), np.uint8), planarconfig="contig", photometric="minisblack"),
    }


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "bmp", "tiff", "tiff zlib", "tiles", "long", "deep", "samples"])
def test_bombs_are_refused_from_the_header(name):
    data = bombs()[name]
    tracemalloc.start()
    began = time.perf_counter()
    assert reason(data) == "too_large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # pages of a TIFF are objects of some KB each; no pixel buffer is ever made
    assert peak < 64e6 and time.perf_counter() - began < 5


def test_a_jpeg_tile_that_declares_more_than_its_tile_is_refused():
    data = bytearray(tiff(np.zeros((64, 64), np.uint8), compression="jpeg", tile=(32, 32), metadata=None))
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, 65000, 65000)
    assert reason(bytes(data)) == "too_large"


def test_a_strip_that_inflates_beyond_its_size_costs_no_memory():
    """A strip of 8 KB that would inflate to 8 MB, in an image of 37 x 53."""
    bomb = zlib.compress(bytes(2**23), 9)
    data = bytearray(tiff(U8, compression="zlib", metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tif:
        offset, count = tif.pages[0].tags["StripOffsets"], tif.pages[0].tags["StripByteCounts"]
        struct.pack_into({3: "<H", 4: "<I"}[offset.dtype], data, offset.valueoffset, len(data))
        struct.pack_into({3: "<H", 4: "<I"}[count.dtype], data, count.valueoffset, len(bomb))
    tracemalloc.start()
    try:
        decode_image(bytes(data) + bomb, "x")
    except ItemError as error:
        assert error.reason == "decode"
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_directory_loops_and_endless_chains():
    data = bytearray(tiff(U8, metadata=None))
    ifd = struct.unpack_from("<I", data, 4)[0]
    tags = struct.unpack_from("<H", data, ifd)[0]
    struct.pack_into("<I", data, ifd + 2 + 12 * tags, ifd)
    assert reason(bytes(data)) == "decode"
    empty = b"II*\0" + struct.pack("<I", 8)
    chain = empty + b"".join(struct.pack("<HI", 0, 8 + 6 * (i + 1)) for i in range(100_000))
    assert reason(chain) == "too_large"


def test_limits_are_settable():
    assert reason(tiff(U16), Limits(max_pixels=37 * 53 - 1)) == "too_large"
    assert decode(tiff(U16), limits=Limits(max_pixels=37 * 53)).pixels.shape == (1, 37, 53)
    assert reason(pages(U16, U16, U16), Limits(max_channels=2)) == "too_large"
    assert reason(tiff(U16), Limits(max_bytes=2 * 37 * 53 - 1)) == "too_large"
    assert reason(pages(U16, U16), Limits(max_bytes=3 * 37 * 53)) == "too_large"
    assert reason(WHOLE["png"], Limits(max_file_bytes=100)) == "too_large"


FUZZED = [
    pil(RGB[:9, :9], "PNG"),
    pil(RGB[:9, :9], "JPEG"),
    pil(RGB[:9, :9], "GIF"),
    pil(RGB[:9, :9], "BMP"),
    pil(RGB[:9, :9], "WEBP"),
    imagecodecs.png_encode(U16[:9, :9]),
    tiff(U16[:9, :9]),
    tiff(U16[:9, :9], compression="lzw", predictor=True),
    tiff(U16[:32, :32], tile=(16, 16), compression="zlib"),
    tiff(np.stack([U16[:9, :9]] * 2), ome=True, metadata={"axes": "CYX"}),
    tiff(np.stack([U16[:9, :9]] * 2), imagej=True, metadata={"axes": "CYX"}),
    tiff(RGB[:16, :16], compression="jpeg", photometric="rgb"),
    tiff(U16[:9, :9], bigtiff=True, byteorder=">"),
    tiff(U16[:16, :16], compression="jpeg2000", compressionargs={"reversible": True}),
    pages(U16[:9, :9], U16[:9, :9]),
    tiff(U8[:9, :9], photometric="palette", colormap=np.zeros((3, 256), np.uint16), metadata=None),
]


@given(
    st.sampled_from(range(len(FUZZED))),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
@settings(max_examples=1500, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@example(0, [], 0.99, True)
def test_any_bytes_give_an_image_or_an_item_error(which, changes, cut, do_cut):
    data = bytearray(FUZZED[which])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    if do_cut:
        data = data[: int(cut * len(data))]
    limits = Limits(max_pixels=2**20, max_bytes=2**24)
    try:
        image = decode_image(bytes(data), "fuzz", limits)
    except ItemError as error:
        assert error.reason in ("empty", "truncated", "not_image", "unsupported", "too_large", "stack", "decode")
    else:
        assert image.pixels.ndim == 3 and image.pixels.nbytes <= limits.max_bytes


@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b"",
            b"II*\0\x08\0\0\0",
            b"MM\0*\0\0\0\x08",
            b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"GIF89a",
            b"BM",
            b"RIFF\x20\0\0\0WEBPVP8 ",
        ]
    ),
)
@settings(max_examples=800, deadline=5000)
def test_random_bytes_after_a_signature(tail, head):
    with contextlib.suppress(ItemError):
        decode_image(head + tail, "fuzz", Limits(max_pixels=2**20, max_bytes=2**24))


# ---- items


def ref(path) -> FileRef:
    info = os.stat(path)
    return FileRef(str(path), info.st_size, str(info.st_mtime_ns))


def write(path, data):
    path.write_bytes(data)
    return ref(path)


def test_load_item_of_one_file(tmp_path):
    loaded = load_item(Item("a", (write(tmp_path / "a.tif", WHOLE["tiff"]),)))
    np.testing.assert_array_equal(loaded.image.pixels, U16[None])
    assert loaded.num_bytes == len(WHOLE["tiff"]) and loaded.read_s > 0 and loaded.decode_s > 0


def test_load_item_stacks_channels_in_order(tmp_path):
    files = tuple(write(tmp_path / f"{i}.tif", tiff(U16 // (i + 1))) for i in range(3))
    image = load_item(Item("a", files, ("DNA", "ER", "Mito"))).image
    np.testing.assert_array_equal(image.pixels, [U16, U16 // 2, U16 // 3])
    assert image.channel_names == ("DNA", "ER", "Mito") and not image.is_rgb8


def error_of(item, kind=ItemError, **kwargs):
    with pytest.raises(kind) as caught:
        load_item(item, **kwargs)
    return caught.value


def test_a_bad_channel_fails_the_item_and_names_the_file(tmp_path):
    good = write(tmp_path / "good.tif", WHOLE["tiff"])
    for name, data, expected in [
        ("cut", WHOLE["tiff"][:-9], "truncated"),
        ("text", b"hello", "not_image"),
        ("rgb", tiff(RGB), "channel_count"),
        ("size", tiff(U16[1:]), "shape"),
        ("type", tiff(U8), "shape"),
    ]:
        error = error_of(Item("a", (good, write(tmp_path / name, data)), ("x", "y")))
        assert error.reason == expected and str(tmp_path / name) in str(error)


def test_files_that_are_missing_or_changed(tmp_path):
    file = write(tmp_path / "a.tif", WHOLE["tiff"])
    assert error_of(Item("a", (FileRef("/no/such", -1, "missing"),))).reason == "missing"
    assert error_of(Item("a", (FileRef(str(tmp_path / "gone"), 5, "1"),))).reason == "missing"
    assert error_of(Item("a", (FileRef(file.uri, file.size + 1, file.version),))).reason == "changed"
    assert error_of(Item("a", (FileRef(file.uri, file.size, "123"),))).reason == "changed"
    os.utime(file.uri, ns=(0, int(file.version) + 1))
    assert error_of(Item("a", (file,))).reason == "changed"


def test_problem_of_the_listing_and_channel_count(tmp_path):
    file = write(tmp_path / "a.tif", WHOLE["pages"])
    error = error_of(Item("a", (file,), problem="channel_count: missing ch3"))
    assert error.reason == "channel_count" and "missing ch3" in str(error)
    assert error_of(Item("a", (file,), problem="bad_id")).reason == "bad_id"
    assert error_of(Item("a", (file,)), num_channels=2).reason == "channel_count"
    assert len(load_item(Item("a", (file,)), num_channels=3).image.pixels) == 3
    assert error_of(Item("a", (file, file))).reason == "channel_count"


def test_file_limit_holds_before_reading(tmp_path, monkeypatch):
    file = write(tmp_path / "a.tif", WHOLE["tiff"])
    monkeypatch.setattr("dinoray.io.reading._fetch", lambda uri: pytest.fail("was read"))
    assert error_of(Item("a", (file,)), limits=Limits(max_file_bytes=10)).reason == "too_large"


def test_all_channels_together_keep_the_byte_limit(tmp_path):
    files = tuple(write(tmp_path / f"{i}.tif", tiff(U16)) for i in range(3))
    item = Item("a", files, ("x", "y", "z"))
    assert error_of(item, limits=Limits(max_bytes=3 * U16.nbytes - 1)).reason == "too_large"
    load_item(item, Limits(max_bytes=3 * U16.nbytes))


@pytest.mark.parametrize(
    "raised, kind",
    [
        (PermissionError(13, "denied"), SystemicError),
        (TimeoutError("slow"), TransientError),
        (ConnectionResetError("reset"), TransientError),
        (OSError(5, "I/O error"), TransientError),
        (FileNotFoundError("gone"), ItemError),
        (IsADirectoryError("folder"), ItemError),
    ],
)
def test_classes_of_storage_errors(monkeypatch, tmp_path, raised, kind):
    def fail(uri):
        raise raised

    monkeypatch.setattr("dinoray.io.reading._fetch", fail)
    error = error_of(Item("a", (write(tmp_path / "a", b"x"),)), kind)
    assert error.__cause__ is raised


@pytest.mark.parametrize("status", [401, 403])
def test_http_status_tells_denied_from_passing(monkeypatch, tmp_path, status):
    """s3fs keeps botocore's error as the cause; aiohttp's error has a status of its own."""
    item = Item("a", (write(tmp_path / "a", b"x"),))

    def s3(uri):
        cause = RuntimeError("ClientError")
        cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
        raise OSError(22, "InvalidToken") from cause

    def http(uri):
        error = OSError("denied")
        error.status = status
        raise error

    for fail in (s3, http):
        monkeypatch.setattr("dinoray.io.reading._fetch", fail)
        assert "credentials" in error_of(item, SystemicError).todo


def test_errors_that_are_ours_are_not_disguised(monkeypatch, tmp_path):
    def fail(uri):
        raise KeyError("a bug")

    monkeypatch.setattr("dinoray.io.reading._fetch", fail)
    error_of(Item("a", (write(tmp_path / "a", b"x"),)), KeyError)


@pytest.fixture
def without_root():
    """A folder that everyone may enter, and no root's rights on it (root reads everything)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        is_root = os.geteuid() == 0
        try:
            yield Path(folder), (lambda: os.seteuid(65534)) if is_root else (lambda: None)
        finally:
            if is_root:
                os.seteuid(0)


def test_an_unreadable_file_is_systemic(without_root):
    folder, drop_rights = without_root
    file = write(folder / "a.tif", WHOLE["tiff"])
    os.chmod(file.uri, 0)
    drop_rights()
    assert "mend the permissions" in error_of(Item("a", (file,)), SystemicError).todo


def test_remote_short_body_is_transient_and_a_new_object_is_changed():
    fs, path = stores.filesystem("memory://bucket/a.tif")
    fs.pipe_file(path, WHOLE["tiff"])
    size = len(WHOLE["tiff"])
    uri = "memory://bucket/a.tif"
    file = RemoteTree(uri).named()
    assert load_item(Item("a", (file,))).image.pixels.shape == (1, 37, 53)
    assert error_of(Item("a", (FileRef(uri, size + 1, file.version),))).reason == "changed"
    fs.pipe_file(path, WHOLE["tiff"])  # the same size, but not the object that was listed
    assert error_of(Item("a", (file,))).reason == "changed"


def test_short_body(monkeypatch):
    fs, path = stores.filesystem("memory://bucket/a.tif")
    fs.pipe_file(path, WHOLE["tiff"])
    monkeypatch.setattr("dinoray.io.reading._fetch", lambda uri: (WHOLE["tiff"][:100], None))
    error = error_of(Item("a", (RemoteTree("memory://bucket/a.tif").named(),)), TransientError)
    assert "only 100 of" in str(error)


# ---- real data


def test_cell_painting_planes_are_16_bit_and_equal_to_pillow():
    folder = data_folder("cellpainting_cytodataframe") / "pediatric_cancer_atlas_BR00143976_images" / "orig"
    for path in sorted(folder.glob("*.tiff")):
        image = decode(path.read_bytes())
        assert image.pixels.shape == (1, 1080, 1080) and image.pixels.dtype == np.uint16
        np.testing.assert_array_equal(image.pixels[0], np.asarray(Image.open(path)))
        assert image.pixels.max() > 255


def test_nuclei_and_photos_are_rgb8():
    path = next((data_folder("dsb2018_stage1") / "stage1_test").glob("*/images/*.png"))
    image = decode(path.read_bytes())
    assert image.is_rgb8
    np.testing.assert_array_equal(image.pixels.transpose(1, 2, 0), np.asarray(Image.open(path).convert("RGB")))
    for path in sorted((data_folder("bccd") / "BCCD" / "JPEGImages").glob("*.jpg"))[:5]:
        np.testing.assert_array_equal(decode(path.read_bytes()).pixels.transpose(1, 2, 0), np.asarray(Image.open(path)))


def test_phenix_field_of_three_channels_is_16_bit():
    for path in (data_folder("scportrait_3ch") / "raw_image_tiles").glob("*.tif"):
        image = decode(path.read_bytes())
        assert image.pixels.shape == (1, 1080, 1080) and image.pixels.dtype == np.uint16


def test_many_pages_without_axes_are_a_stack_not_channels():
    pages = np.arange(17 * 32 * 32, dtype=np.uint16).reshape(17, 32, 32)
    with pytest.raises(ItemError, match="17 pages without axes") as refusal:
        decode(tiff(pages, photometric="minisblack", metadata=None))
    assert refusal.value.reason == "stack"
    assert decode(tiff(pages[:16], photometric="minisblack", metadata=None)).pixels.shape == (16, 32, 32)
