"""Arrays and pictures to protobuf and back, checked before memory is allocated for them.

The wire has no object serialisation of any kind: dtype, shape and little-endian bytes (Tensor), or an encoded picture with
its declared size (Image).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .common.v1 import common_pb2
from .errors import InvalidInput

# 64 MiB: a 4K RGB picture is 25 MiB; nothing a robot sends in one value is larger.
MAX_VALUE_BYTES = 64 * 1024 * 1024
# Of all values of one message once decoded: a megabyte of well-packed pictures must not become a hundred gigabytes.
MAX_DECODED_BYTES = 4 * MAX_VALUE_BYTES
DEFAULT_JPEG_QUALITY = 95
# Of pictures that are decoded in a fraction of a millisecond: pixels, and bytes of a baseline JPEG or uncompressed.
QUICK_PIXELS, QUICK_BYTES = 256 * 256, 3 * 256 * 256
QUICK_JPEG_BYTES = 64 * 1024

# Passes over a JPEG's pixels, as progressive ones have: some ten. An empty one has eleven bytes, and costs a decoder 0.3 to
# 0.4 ms a megapixel.
MAX_SCANS = 64
_BASELINE = 0xC0  # Marker of a JPEG's frame: one pass over its pixels, or one a colour.
# Of a scan, which is such a pass. Inside of one no byte FF stands before another marker's.
_SCAN = b"\xff\xda"

_TO_NUMPY: dict[int, np.dtype[np.generic]] = {
    common_pb2.DATA_TYPE_BOOL: np.dtype("bool"),
    common_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    common_pb2.DATA_TYPE_INT8: np.dtype("i1"),
    common_pb2.DATA_TYPE_INT16: np.dtype("<i2"),
    common_pb2.DATA_TYPE_UINT16: np.dtype("<u2"),
    common_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    common_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    common_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    # numpy has no bfloat16: its bits travel as uint16, and torch code views them as bfloat16.
    common_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),
    common_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    common_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_FROM_NUMPY: dict[str, common_pb2.DataType.ValueType] = {
    "bool": common_pb2.DATA_TYPE_BOOL,
    "uint8": common_pb2.DATA_TYPE_UINT8,
    "int8": common_pb2.DATA_TYPE_INT8,
    "int16": common_pb2.DATA_TYPE_INT16,
    "uint16": common_pb2.DATA_TYPE_UINT16,
    "int32": common_pb2.DATA_TYPE_INT32,
    "int64": common_pb2.DATA_TYPE_INT64,
    "float16": common_pb2.DATA_TYPE_FLOAT16,
    "float32": common_pb2.DATA_TYPE_FLOAT32,
    "float64": common_pb2.DATA_TYPE_FLOAT64,
}


def data_type_of(name: str) -> common_pb2.DataType.ValueType:
    """The wire's name of a numpy dtype; InvalidInput names the ones that exist."""
    if name not in _FROM_NUMPY:
        raise InvalidInput(f"dtype {name!r} cannot travel; use one of {', '.join(_FROM_NUMPY)}", field="dtype")
    return _FROM_NUMPY[name]


def numpy_dtype_of(data_type: int, *, field: str = "dtype") -> np.dtype[np.generic]:
    """The little-endian numpy dtype of a wire DataType (bfloat16 reads as uint16 bits)."""
    if data_type not in _TO_NUMPY:
        raise InvalidInput(f"data type {data_type} is not one this reader knows", field=field)
    return _TO_NUMPY[data_type]


def encode_tensor(array: npt.ArrayLike) -> common_pb2.Tensor:
    """Any numeric array of at most MAX_VALUE_BYTES. Objects and strings are refused."""
    values = np.asarray(array)
    data_type = data_type_of(values.dtype.name)
    if values.nbytes > MAX_VALUE_BYTES:
        raise InvalidInput(
            f"shape {values.shape} needs {values.nbytes} bytes, over the limit of {MAX_VALUE_BYTES}", field="tensor"
        )
    little_endian = np.asarray(values, dtype=_TO_NUMPY[data_type])
    return common_pb2.Tensor(dtype=data_type, shape=values.shape, data=little_endian.tobytes())


def decode_tensor(
    tensor: common_pb2.Tensor, *, field: str = "tensor", max_bytes: int = MAX_VALUE_BYTES
) -> npt.NDArray[np.generic]:
    """A read-only array over the message's bytes.

    Raises:
        InvalidInput: Unknown dtype, negative or overflowing shape, more than max_bytes, or bytes that do not fit the shape.
    """
    dtype = numpy_dtype_of(tensor.dtype, field=f"{field}.dtype")
    shape = tuple(tensor.shape)
    if len(shape) > 8 or any(extent < 0 for extent in shape):
        raise InvalidInput(f"shape {shape} must have at most 8 extents, none negative", field=f"{field}.shape")
    num_bytes = math.prod(shape) * dtype.itemsize  # Python integers: no overflow.
    spanned = math.prod(max(extent, 1) for extent in shape) * dtype.itemsize  # NumPy has a limit for empty arrays as well.
    if spanned > max_bytes:
        raise InvalidInput(f"shape {shape} needs {spanned} bytes, over the limit of {max_bytes}", field=f"{field}.shape")
    data = tensor.data  # Each read of a bytes field copies it: once.
    if len(data) != num_bytes:
        raise InvalidInput(
            f"{len(data)} bytes do not fit shape {shape} of {dtype.name}, which needs {num_bytes}", field=f"{field}.data"
        )
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    # numpy would carry any other byte along as a truth value that is neither True nor False.
    if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise InvalidInput("a BOOL element is 0 or 1", field=f"{field}.data")
    return array


def encode_image(
    pixels: npt.NDArray[np.uint8],
    encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG,
    *,
    jpeg_quality: int = DEFAULT_JPEG_QUALITY,
) -> common_pb2.Image:
    """pixels: (H, W, 3) uint8, RGB."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise InvalidInput(f"a picture is (H, W, 3) uint8 RGB, not {pixels.shape} {pixels.dtype.name}", field="image")
    height, width = pixels.shape[:2]
    if encoding == common_pb2.IMAGE_ENCODING_RAW_RGB8:
        data = np.ascontiguousarray(pixels).tobytes()
    elif encoding == common_pb2.IMAGE_ENCODING_JPEG:
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])[1].tobytes()
    elif encoding == common_pb2.IMAGE_ENCODING_PNG:
        data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    else:
        raise InvalidInput(f"encoding {encoding} is not one this writer knows", field="image.encoding")
    return common_pb2.Image(encoding=encoding, height=height, width=width, data=data)


def decode_image(image: common_pb2.Image, *, field: str = "image") -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of exactly the declared size.

    Raises:
        InvalidInput: Unknown encoding, absurd size, bytes that are no picture, a picture of another size than declared, or
            one of more scans than pictures have.
    """
    height, width = image.height, image.width
    if height <= 0 or width <= 0 or height * width * 3 > MAX_VALUE_BYTES:
        raise InvalidInput(f"declared size {height}x{width} is empty or over {MAX_VALUE_BYTES} bytes", field=field)
    data = image.data
    if image.encoding == common_pb2.IMAGE_ENCODING_RAW_RGB8:
        if len(data) != height * width * 3:
            raise InvalidInput(f"{len(data)} bytes are not {height}x{width}x3", field=field)
        return np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)
    if image.encoding == common_pb2.IMAGE_ENCODING_JPEG:
        encoded_size, is_whole = _jpeg_size(data), data.rstrip(b"\0").endswith(b"\xff\xd9")
    elif image.encoding == common_pb2.IMAGE_ENCODING_PNG:
        encoded_size, is_whole = _png_size(data), data.endswith(b"\0\0\0\0IEND\xaeB`\x82")
    else:
        raise InvalidInput(f"encoding {image.encoding} is not one this reader knows", field=f"{field}.encoding")
    if encoded_size is None:
        raise InvalidInput(f"{len(data)} bytes are not a picture in the declared encoding", field=field)
    # The declared size was checked; the picture's own header must agree with it before its pixels are allocated.
    if encoded_size != (height, width):
        raise InvalidInput(
            f"the picture is {encoded_size[0]}x{encoded_size[1]} (height x width), declared {height}x{width}", field=field
        )
    if image.encoding == common_pb2.IMAGE_ENCODING_JPEG and (num_scans := data.count(_SCAN)) > MAX_SCANS:
        raise InvalidInput(f"the picture has {num_scans} scans, at most {MAX_SCANS}", field=field)
    # Decoders fill what is missing with grey, which a policy would take for the world.
    if not is_whole:
        raise InvalidInput(f"the picture is cut off after {len(data)} bytes", field=field)
    # Pictures are in the spec's orientation; a tag inside them must not turn them.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    if decoded is None or decoded.shape != (height, width, 3):
        raise InvalidInput(f"{len(data)} bytes are not a picture in the declared encoding", field=field)
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def is_quick(image: common_pb2.Image) -> bool:
    """Whether decode_image() takes a fraction of a millisecond, whatever the bytes are.

    A JPEG with more scans than colours never is: a few kilobytes can hold thousands of passes over all of its pixels.
    """
    if image.height * image.width > QUICK_PIXELS:
        return False
    data = image.data
    if image.encoding == common_pb2.IMAGE_ENCODING_RAW_RGB8:
        return len(data) <= QUICK_BYTES
    if image.encoding != common_pb2.IMAGE_ENCODING_JPEG or len(data) > QUICK_JPEG_BYTES:
        return False
    if data.count(_SCAN) > 3:
        return False
    frame = _jpeg_frame(data)
    return frame is not None and frame[0] == _BASELINE and frame[1:] == (image.height, image.width)


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a PNG's first chunk, which must be its header; None where it is not."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG; None where it has no frame."""
    frame = _jpeg_frame(data)
    return None if frame is None else frame[1:]


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(marker, height, width) from a JPEG's first frame header; None where there is none.

    Only markers that carry a length are passed over. Decoders also accept markers without one, and rubbish in between; a
    picture with those could show one frame header here and another one there, so it is refused.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # Fill byte.
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # Start of frame.
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            return marker, height, int.from_bytes(data[position + 7 : position + 9], "big")
        elif (marker == 0xC4 or 0xDB <= marker <= 0xFE) and marker != 0xDA and length >= 2:
            position += 2 + length
        else:
            return None
    return None


def encode_values(
    values: Mapping[str, npt.NDArray[np.generic]],
    *,
    image_encoding: common_pb2.ImageEncoding.ValueType = common_pb2.IMAGE_ENCODING_JPEG,
) -> list[common_pb2.NamedValue]:
    """Named arrays in the mapping's order; (H, W, 3) uint8 arrays travel as images."""
    named: list[common_pb2.NamedValue] = []
    for name, value in values.items():
        if value.ndim == 3 and value.dtype == np.uint8:
            image = encode_image(value.view(np.uint8), image_encoding)
            named.append(common_pb2.NamedValue(name=name, image=image))
        else:
            named.append(common_pb2.NamedValue(name=name, tensor=encode_tensor(value)))
    return named


def decode_value(value: common_pb2.NamedValue) -> npt.NDArray[np.generic]:
    """The array of one value; images as (H, W, 3) uint8."""
    which = value.WhichOneof("value")
    if which == "tensor":
        return decode_tensor(value.tensor, field=value.name)
    if which == "image":
        return decode_image(value.image, field=value.name)
    raise InvalidInput("neither tensor nor image is set", field=value.name)


def decode_values(
    values: Iterable[common_pb2.NamedValue], *, max_bytes: int = MAX_DECODED_BYTES
) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays by name, in order. A name that comes twice is refused, and more than max_bytes in all."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    left_bytes = max_bytes
    for value in values:
        if value.name in arrays:
            raise InvalidInput("comes twice", field=value.name)
        # A tensor's bytes are here already; a picture's pixels are not.
        left_bytes -= value.image.height * value.image.width * 3 if value.HasField("image") else len(value.tensor.data)
        if left_bytes < 0:
            raise InvalidInput(f"brings the message over {max_bytes} bytes once decoded", field=value.name)
        arrays[value.name] = decode_value(value)
    return arrays
