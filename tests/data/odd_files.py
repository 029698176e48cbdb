"""Image files that Pillow cannot write: bit depths, masks and chunks as cameras, scanners and tools make them."""

import struct
import zlib

import numpy as np


def packed(levels, bits, order="<"):
    """Rows of integers, each row packed into whole bytes, the most significant bit first."""
    rows = levels.reshape(len(levels), -1)
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    shifts = np.arange(bits - 1, -1, -1)
    bitmap = (rows[..., None].astype(np.uint32) >> shifts) & 1
    return b"".join(np.packbits(row.reshape(-1)).tobytes() for row in bitmap.astype(np.uint8))


def tiff(levels, bits, *, order="<", photometric=None, data=None, compression=1, tags=()):
    """An uncompressed TIFF of one strip.

    Args:
      levels: integers (h, w), or (h, w, samples) interleaved.
      bits: of a sample.
      order: "<" or ">".
      photometric: 0 white is zero, 1 black is zero (the default of one sample), 2 RGB.
      data: the strip, if it is not `levels` packed.
      compression: the tag; `data` must fit it.
      tags: more (number, type, values): type 3 is 16 bits, 4 is 32 bits, 1 a byte.
    """
    height, width, *rest = levels.shape
    samples = rest[0] if rest else 1
    photometric = (1 if samples < 3 else 2) if photometric is None else photometric
    data = packed(levels, bits, order) if data is None else data
    fields = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (bits,) * samples),
        259: (3, (compression,)),
        262: (3, (photometric,)),
        273: (4, (8,)),
        277: (3, (samples,)),
        278: (4, (height,)),
        279: (4, (len(data),)),
    }
    fields |= {number: (kind, values) for number, kind, values in tags}
    data += b"\0" * (len(data) % 2)
    start = 8 + len(data)
    beyond = start + 2 + 12 * len(fields) + 4
    directory, long = struct.pack(f"{order}H", len(fields)), b""
    for number, (kind, values) in sorted(fields.items()):
        code = {1: "B", 2: "c", 3: "H", 4: "I", 11: "f"}[kind]
        content = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(content) > 4:
            content += b"\0" * (len(content) % 2)
            long, content = long + content, struct.pack(f"{order}I", beyond + len(long))
        directory += struct.pack(f"{order}HHI", number, kind, len(values)) + content.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, start)
    return head + data + directory + bytes(4) + long


def png_chunk(name, data, crc=None):
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


def png(levels, bits, colour, *chunks, after=()):
    """A PNG of any depth; colour 0 is L, 2 RGB, 3 a palette, 4 LA and 6 RGBA.

    Args:
      levels: integers (h, w) or (h, w, samples).
      bits: of a sample.
      colour: the colour type.
      chunks: (name, data) before the pixels, or whole chunks as bytes.
      after: the same, after the pixels.
    """
    rows = packed(levels, bits, ">")
    stride = len(rows) // max(len(levels), 1)
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(len(levels)))
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        part if isinstance(part, bytes) else png_chunk(*part) for part in parts
    )


def bmp(pixels, masks=None, *, header=124):
    """A BMP of 32 bits, bottom row first.

    Args:
      pixels: uint8 (h, w, 4), stored as blue, green, red and a fourth byte.
      masks: of red, green, blue and alpha; BI_RGB, which has no alpha, without.
      header: its bytes; 124 holds masks.
    """
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels[::-1]).tobytes()
    compression = 0 if masks is None else 3
    head = struct.pack(
        "<IiiHHIIiiII", header, width, height, 1, 32, compression, len(data), 2835, 2835, 0, 0
    )
    head += struct.pack("<4I", *(masks or (0, 0, 0, 0)))[: header - 40]
    head = head.ljust(header, b"\0")
    offset = 14 + header
    return struct.pack("<2sIHHI", b"BM", offset + len(data), 0, 0, offset) + head + data


def segment(marker, content):
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(data, *segments):
    """A JPEG with more segments at its beginning."""
    return data[:2] + b"".join(segments) + data[2:]
