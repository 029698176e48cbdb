"""The records of a TFRecord file, without TensorFlow.

A record is its length (uint64), the masked CRC-32C of those 8 bytes (uint32), the data, and the masked CRC-32C
of the data, all little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cait_jax.errors import UserError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """Yields the records of an uncompressed TFRecord file in order, each checked by its sums.

    Args:
      path: the file.

    Raises:
      UserError: while iterating, if the file is cut short or damaged, or is none.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        number = 0
        while header := file.read(_HEADER.size):
            yield _record(file, header, size, f"record {number} of {path}")
            number += 1


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data`, rotated right by 15 bits and shifted by a constant, as TFRecord stores it."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _record(file: BinaryIO, header: bytes, size: int, which: str) -> bytes:
    if len(header) < _HEADER.size:
        raise _cut_short(which)
    length, of_length = _HEADER.unpack(header)
    if masked_crc(header[:8]) != of_length:
        raise UserError(f"{which} is damaged (the sum of its length is wrong): copy the file again")
    if file.tell() + length + _FOOTER.size > size:
        raise _cut_short(which)
    data = file.read(length)
    (of_data,) = _FOOTER.unpack(file.read(_FOOTER.size))
    if masked_crc(data) != of_data:
        raise UserError(f"{which} is damaged (the sum of its data is wrong): copy the file again")
    return data


def _cut_short(which: str) -> UserError:
    return UserError(f"{which} is cut short: copy the file again")
