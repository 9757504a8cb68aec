"""Encoded images of every kind the decoder must have a fate for, generated in memory."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GRADIENT = np.stack(
    np.broadcast_arrays(
        np.linspace(20, 220, 80)[None, :],
        np.linspace(30, 200, 64)[:, None],
        np.full((64, 80), 90.0),
    ),
    axis=-1,
).astype(np.uint8)  # [h=64, w=80, 3], smooth: lossy formats stay close


def encode(image, file_format="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(seed, height=64, width=80):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _png(width, height, bits, colour, raw):
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def png_header(width, height):
    """A PNG that declares a size and holds next to no pixels."""
    return _png(width, height, 8, 2, bytes(100))


def png_16_bit(pixels):
    """A 16-bit PNG of uint16 [h, w, 3], with alpha 4, grey with alpha 2; Pillow writes none."""
    height, width, channels = pixels.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return _png(width, height, 16, {2: 4, 3: 2, 4: 6}[channels], raw)


def animated(file_format):
    frames = [Image.fromarray(np.roll(GRADIENT, i, axis=2)) for i in range(3)]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


def exif_rotated(file_format, orientation=6):
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(GRADIENT, file_format, exif=exif)
