"""Whatever bytes a peer sends, decoding gives what was declared or InvalidInput: nothing else, and no huge memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manyhands import codec
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput

JPEG = common_pb2.IMAGE_ENCODING_JPEG
PNG = common_pb2.IMAGE_ENCODING_PNG
RAW = common_pb2.IMAGE_ENCODING_RAW_RGB8
DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64"]


def _picture(height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4 % 256, columns * 4 % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)


@given(hnp.arrays(dtype=st.sampled_from(DTYPES), shape=hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)))
def test_tensor_round_trip(array: np.ndarray) -> None:
    decoded = codec.decode_tensor(codec.encode_tensor(array))
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=">f4").reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.arange(9)[::2]]
)
def test_byte_order_and_strides_of_the_sender_do_not_matter(array: np.ndarray) -> None:
    np.testing.assert_array_equal(codec.decode_tensor(codec.encode_tensor(array)), array)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array([1 + 2j]), np.array(["2020"], "M8[Y]")])
def test_objects_texts_and_other_types_do_not_travel(array: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="dtype"):
        codec.encode_tensor(array)


@given(
    st.integers(-1, 20),
    st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 4)), max_size=10),
    st.binary(max_size=64),
)
@settings(max_examples=300)
def test_any_tensor_message_decodes_or_is_refused(dtype: int, shape: list[int], data: bytes) -> None:
    message = common_pb2.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    try:
        array = codec.decode_tensor(message)
    except InvalidInput:
        return
    assert list(array.shape) == shape
    assert array.nbytes == len(data)


@pytest.mark.parametrize(
    ("shape", "data", "field"),
    [
        ((2**62, 4), b"", "arm.shape"),
        ((-1, -4), b"1234", "arm.shape"),
        ((1,) * 9, b"1234", "arm.shape"),
        ((3,), b"12345678", "arm.data"),
        ((1,), b"12345", "arm.data"),
        ((codec.MAX_VALUE_BYTES,), b"", "arm.shape"),
        ((0, 306, 306, 12_312_801_749_401), b"", "arm.shape"),
    ],
    ids=["overflows", "negative", "nine extents", "short", "long", "over the limit", "empty, over NumPy's"],
)
def test_hostile_tensor_is_refused_by_field_without_memory_for_it(shape: tuple[int, ...], data: bytes, field: str) -> None:
    message = common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_FLOAT32, shape=shape, data=data)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput) as caught:
            codec.decode_tensor(message, field="arm")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.field == field


def test_truth_values_are_zero_or_one() -> None:
    with pytest.raises(InvalidInput, match="0 or 1"):
        codec.decode_tensor(common_pb2.Tensor(dtype=common_pb2.DATA_TYPE_BOOL, shape=(2,), data=b"\x01\x02"))


@pytest.mark.parametrize(("encoding", "tolerance"), [(RAW, 0), (PNG, 0), (JPEG, 12)])
def test_picture_round_trip_keeps_colours_in_place(encoding: common_pb2.ImageEncoding.ValueType, tolerance: int) -> None:
    pixels = _picture()
    decoded = codec.decode_image(codec.encode_image(pixels, encoding))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize("encoding", [RAW, JPEG, PNG])
def test_picture_cut_off_anywhere_is_refused(encoding: common_pb2.ImageEncoding.ValueType) -> None:
    whole = codec.encode_image(_picture(), encoding)
    for length in {*range(0, len(whole.data), 7), len(whole.data) - 1}:
        cut = common_pb2.Image(encoding=encoding, height=48, width=64, data=whole.data[:length])
        with pytest.raises(InvalidInput):
            codec.decode_image(cut)


@pytest.mark.parametrize("encoding", [JPEG, PNG])
def test_cut_off_picture_is_not_left_to_the_decoder(
    encoding: common_pb2.ImageEncoding.ValueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some decoders fill the rest with grey and report success."""
    whole = codec.encode_image(_picture(), encoding)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("pixels were decoded"))
    cut = common_pb2.Image(encoding=encoding, height=48, width=64, data=whole.data[:-40])
    with pytest.raises(InvalidInput, match="cut off"):
        codec.decode_image(cut)


@pytest.mark.parametrize("encoding", [RAW, JPEG, PNG])
@pytest.mark.parametrize(("height", "width"), [(48, 63), (47, 64), (0, 64), (-48, -64), (2**31 - 1, 2**31 - 1)])
def test_declared_size_must_be_the_pictures(encoding: common_pb2.ImageEncoding.ValueType, height: int, width: int) -> None:
    image = codec.encode_image(_picture(), encoding)
    image.height, image.width = height, width
    with pytest.raises(InvalidInput):
        codec.decode_image(image, field="wrist")


@pytest.mark.parametrize("encoding", [JPEG, PNG])
def test_height_and_width_the_wrong_way_round_are_refused(encoding: common_pb2.ImageEncoding.ValueType) -> None:
    image = codec.encode_image(_picture(48, 64), encoding)
    image.height, image.width = 64, 48
    with pytest.raises(InvalidInput, match="48x64"):
        codec.decode_image(image)


def _png_of(height: int, width: int) -> bytes:
    """A PNG of one colour: kilobytes that unpack to height * width * 3 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 64))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_png_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(cv2, "imdecode", decode)
    bomb = _png_of(30_000, 30_000)
    assert len(bomb) < 100_000
    with pytest.raises(InvalidInput, match="30000x30000"):
        codec.decode_image(common_pb2.Image(encoding=PNG, height=48, width=64, data=bomb))
    with pytest.raises(InvalidInput):  # Also where the declaration does not lie.
        codec.decode_image(common_pb2.Image(encoding=PNG, height=30_000, width=30_000, data=bomb))


@pytest.mark.parametrize("disguise", [b"\xff\x01", b"\xff\xd0", b"\xff\x00", b"rubbish"])
def test_jpeg_that_hides_its_frame_header_from_us_is_refused(disguise: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder steps over these; a reader that took them for a segment would see the small header, the decoder the huge
    one."""
    honest = codec.encode_image(_picture()).data
    small = honest[2:]
    huge = bytearray(small)
    frame = huge.index(b"\xff\xc0")
    huge[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    # Whoever reads the next marker as the disguise's length (65504) lands on the small picture.
    start = b"\xff\xd8" + disguise + b"\xff\xe0" + struct.pack(">H", 16) + bytes(14)
    disguised = start + huge + bytes(4 + 0xFFE0 - len(start) - len(huge)) + small
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(InvalidInput):
        codec.decode_image(common_pb2.Image(encoding=JPEG, height=48, width=64, data=disguised))


def test_orientation_tag_does_not_turn_the_picture() -> None:
    pixels = _picture(48, 48)
    plain = codec.encode_image(pixels).data
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\0\0\0\0"
    tagged = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    decoded = codec.decode_image(common_pb2.Image(encoding=JPEG, height=48, width=48, data=tagged))
    assert np.abs(decoded.astype(int) - pixels).max() <= 12


@given(st.sampled_from([JPEG, PNG]), st.integers(0, 3000), st.binary(min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_damaged_picture_is_refused_or_keeps_its_size(
    encoding: common_pb2.ImageEncoding.ValueType, position: int, junk: bytes
) -> None:
    image = codec.encode_image(_picture(), encoding)
    position %= len(image.data)
    image.data = image.data[:position] + junk + image.data[position + len(junk) :]
    try:
        decoded = codec.decode_image(image)
    except InvalidInput:
        return
    assert decoded.shape == (48, 64, 3)
    assert decoded.dtype == np.uint8


def test_message_of_many_large_pictures_is_refused() -> None:
    picture = codec.encode_image(np.zeros((1000, 1000, 3), np.uint8), PNG)
    values = [common_pb2.NamedValue(name=f"camera-{number}", image=picture) for number in range(3)]
    assert len(codec.decode_values(values)) == 3
    with pytest.raises(InvalidInput, match="over 8000000 bytes") as caught:
        codec.decode_values(values, max_bytes=8_000_000)
    assert caught.value.field == "camera-2"


def test_values_keep_order_and_refuse_a_name_twice_or_nothing() -> None:
    arrays = {"b": np.zeros(2, np.float32), "a": _picture()}
    values = codec.encode_values(arrays, image_encoding=PNG)
    decoded = codec.decode_values(values)
    assert list(decoded) == ["b", "a"]
    for name, array in decoded.items():
        np.testing.assert_array_equal(array, arrays[name])
    with pytest.raises(InvalidInput, match="twice"):
        codec.decode_values([*values, values[0]])
    with pytest.raises(InvalidInput, match="neither"):
        codec.decode_value(common_pb2.NamedValue(name="x"))


def _encoded_jpeg(pixels: np.ndarray, *, progressive: bool = False) -> common_pb2.Image:
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)])[1].tobytes()
    return common_pb2.Image(
        encoding=common_pb2.IMAGE_ENCODING_JPEG, height=pixels.shape[0], width=pixels.shape[1], data=data
    )


def test_small_pictures_are_quick_and_what_may_take_long_is_not() -> None:
    small = _picture(64, 80)
    assert codec.is_quick(_encoded_jpeg(small))
    assert codec.is_quick(codec.encode_image(small, common_pb2.IMAGE_ENCODING_RAW_RGB8))
    assert not codec.is_quick(_encoded_jpeg(small, progressive=True))
    assert not codec.is_quick(codec.encode_image(small, common_pb2.IMAGE_ENCODING_PNG))
    assert not codec.is_quick(_encoded_jpeg(_picture(257, 256)))
    declared_small = _encoded_jpeg(_picture(480, 640))
    declared_small.height, declared_small.width = 64, 80
    assert not codec.is_quick(declared_small)
    many_scans = _encoded_jpeg(small)
    at = many_scans.data.index(b"\xff\xda")
    one_colour_more = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    many_scans.data = many_scans.data[:at] + (codec.MAX_SCANS - 1) * one_colour_more + many_scans.data[at:]
    assert codec.decode_image(many_scans).shape == small.shape
    assert not codec.is_quick(many_scans)
    many_scans.data = many_scans.data[:at] + one_colour_more + many_scans.data[at:]
    with pytest.raises(InvalidInput, match=f"has {codec.MAX_SCANS + 1} scans, at most {codec.MAX_SCANS}"):
        codec.decode_image(many_scans)
    padded = _encoded_jpeg(small)
    padded.data += bytes(codec.QUICK_JPEG_BYTES)
    assert not codec.is_quick(padded)
    assert not codec.is_quick(common_pb2.Image(encoding=common_pb2.IMAGE_ENCODING_JPEG, height=8, width=8, data=b"no"))
