"""Pictures to test with: photograph-like ones, each file format, and small PDFs written by hand."""

import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZES = {
    "landscape": (120, 80),
    "portrait": (61, 97),
    "square": (64, 64),
    "small": (9, 14),
    "wide": (211, 40),
    "tall": (17, 300),
}


def draw(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with edges and noise, in which a wrong filter or an offset shows."""
    rng = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + c) + c) * np.cos(y / (5 - c)) for c in range(3)]
    values = 127 + 90 * np.stack(waves, -1) + 60 * ((x // 7 + y // 5) % 2)[..., None] - 30
    values = np.clip(values + rng.normal(0, 12, values.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(values)
    if mode in ("RGBA", "LA"):
        alpha = Image.fromarray(((x * 7 + y * 3) % 256).astype(np.uint8))
        image.putalpha(alpha)
    return image.convert(mode)


def encode(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has next to no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def with_exif_behind(png: bytes, orientation: int) -> bytes:
    """A PNG whose EXIF stands behind its pixels, where ImageMagick writes it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    end = len(png) - 12
    return png[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + png[end:]


def write_pdf(pages: int = 1, size: tuple[int, int] = (72, 36), encrypt: bytes = b"") -> bytes:
    """A PDF whose pages have a red square in the lower left corner, half as high as the page."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(pages))
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%b] /Count %d >>" % (kids, pages),
        encrypt or b"null",
    ]
    for i in range(pages):
        box = b"[0 0 %d %d]" % size
        bodies.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox %b /Contents %d 0 R >>" % (box, 5 + 2 * i)
        )
        drawn = b"1 0 0 rg 0 0 %d %d re f" % (size[1] // 2, size[1] // 2)
        bodies.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(drawn), drawn))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"/Size %d /Root 1 0 R" % (len(bodies) + 1)
    if encrypt:
        trailer += b" /Encrypt 3 0 R /ID [<00> <00>]"
    xref = b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    end = b"trailer << %b >>\nstartxref\n%d\n%%%%EOF\n" % (trailer, len(out))
    return out + xref + table + end


_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def write_locked_pdf(password: bytes) -> bytes:
    """A page without contents, encrypted as in PDF 1.7, 7.6.3 (RC4 of 40 bits)."""
    owner = bytes(32)
    key = hashlib.md5((password + _PADDING)[:32] + owner + struct.pack("<i", -4) + b"\0").digest()
    user = _rc4(key[:5], _PADDING)
    encrypt = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%b> /U <%b> >>" % (
        owner.hex().encode(),
        user.hex().encode(),
    )
    return write_pdf(encrypt=encrypt)


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
