"""A document as a PDF of one page: its picture, and its text unseen above it, as scanners write.

A clean page's PNG stream is put into the PDF as it is (a PDF reads PNG's row filters), a worn one
as JPEG. The text is in fonts that are named, not embedded: nothing shows it, and readers know the
codes (PDF 32000-1, 9.3.6 and 9.7.5.2).
"""

import io
import math
import struct
from collections.abc import Iterable

from PIL import Image

from llmprep_jax.data.synthetic_documents.generator import Document, Run

POINTS = 0.72  # a pixel: pages are drawn at 100 dots an inch
WIDTH = 500  # of a Latin letter, in thousandths; words are then stretched to their length
QUALITY = 88  # of JPEG
# the font and the character collection of each kind of Chinese
_HAN = {"zh-Hans": ("STSong-Light", "GB1", "UniGB"), "zh-Hant": ("MSung-Light", "CNS1", "UniCNS")}


def to_pdf(document: Document) -> bytes:
    """The PDF's bytes."""
    width, height = document.image.size
    box = f"[0 0 {width * POINTS:.2f} {height * POINTS:.2f}]"
    resources = "<< /XObject << /I 5 0 R >> /Font << /F 6 0 R >> >>"
    is_worn = document.level == "varied"
    contents = _contents(document).encode("latin-1")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 4 0 R"
        f" /Resources {resources} >>".encode(),
        _stream("", contents),
        _jpeg_image(document.image) if is_worn else _png_image(document.image),
        *_fonts(document.language),
    ]
    return _join(objects)


def _contents(document: Document) -> str:
    width, height = document.image.size
    picture = f"q {width * POINTS:.2f} 0 0 {height * POINTS:.2f} 0 0 cm /I Do Q"
    texts = (_text(run, height, document.language) for run in document.runs)
    return "\n".join([picture, "BT 3 Tr", *texts, "ET"])  # 3: neither filled nor outlined


def _text(run: Run, height: int, language: str) -> str:
    """One word, turned and stretched so that it lies where the picture has it."""
    (x0, y0), (x1, y1) = run.start, run.end
    across, up = (x1 - x0) * POINTS, (y0 - y1) * POINTS
    length, size = math.hypot(across, up), run.size * POINTS
    cos, sin = across / length, up / length
    if language == "en":
        units, code = len(run.text) * WIDTH / 1000, run.text.encode("cp1252", "replace").hex()
    else:
        units, code = len(run.text), run.text.encode("utf-16-be").hex()
    stretch = 100 * length / (units * size)
    at = f"{x0 * POINTS:.2f} {(height - y0) * POINTS:.2f}"
    return (
        f"/F {size:.2f} Tf {stretch:.2f} Tz {cos:.5f} {sin:.5f} {-sin:.5f} {cos:.5f} {at} Tm"
        f" <{code}> Tj"
    )


def _fonts(language: str) -> list[bytes]:
    """Object 6, the font, and what it refers to."""
    if language == "en":
        widths = " ".join([str(WIDTH)] * 224)
        return [
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding"
            b" /FirstChar 32 /LastChar 255 /Widths [" + widths.encode() + b"] /FontDescriptor 7 0 R"
            b" >>",
            _descriptor("Helvetica"),
        ]
    name, ordering, cmap = _HAN[language]
    return [
        f"<< /Type /Font /Subtype /Type0 /BaseFont /{name}-{cmap}-UTF16-H"
        f" /Encoding /{cmap}-UTF16-H /DescendantFonts [7 0 R] >>".encode(),
        f"<< /Type /Font /Subtype /CIDFontType0 /BaseFont /{name} /DW 1000 /FontDescriptor 8 0 R"
        f" /CIDSystemInfo << /Registry (Adobe) /Ordering ({ordering}) /Supplement 2 >> >>".encode(),
        _descriptor(name),
    ]


def _descriptor(name: str) -> bytes:
    return (
        f"<< /Type /FontDescriptor /FontName /{name} /Flags 32 /FontBBox [0 -200 1000 900]"
        " /ItalicAngle 0 /Ascent 880 /Descent -120 /CapHeight 700 /StemV 80 >>"
    ).encode()


def _png_image(image: Image.Image) -> bytes:
    """The rows of a PNG as they are: filtered one by one and deflated."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    rows = b"".join(_chunks(buffer.getvalue(), b"IDAT"))
    width, height = image.size
    parms = f"/DecodeParms << /Predictor 15 /Colors 3 /BitsPerComponent 8 /Columns {width} >>"
    return _stream(f"{_picture(width, height)} /Filter /FlateDecode {parms}", rows)


def _jpeg_image(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return _stream(f"{_picture(*image.size)} /Filter /DCTDecode", buffer.getvalue())


def _picture(width: int, height: int) -> str:
    return (
        f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /ColorSpace /DeviceRGB"
        " /BitsPerComponent 8"
    )


def _chunks(png: bytes, wanted: bytes) -> Iterable[bytes]:
    """The data of a PNG's chunks of a kind."""
    at = 8  # after the signature
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == wanted:
            yield png[at + 8 : at + 8 + length]
        at += length + 12


def _stream(entries: str, data: bytes) -> bytes:
    head = f"<< {entries} /Length {len(data)} >>\nstream\n".encode()
    return head + data + b"\nendstream"


def _join(objects: list[bytes]) -> bytes:
    """Numbers the objects from 1 and writes where each begins."""
    out, starts = b"%PDF-1.5\n%\xe2\xe3\xcf\xd3\n", []
    for number, content in enumerate(objects, 1):
        starts.append(len(out))
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    size = len(objects) + 1
    return (
        out
        + (
            f"xref\n0 {size}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
        ).encode()
    )
