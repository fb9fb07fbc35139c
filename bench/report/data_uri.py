"""Pictures inside the page's text."""

from __future__ import annotations

import base64
import io
from pathlib import Path


def data_uri(path: Path, width: int) -> str:
    """The image at most ``width`` pixels wide, as a PNG of 256 colours in a data URI."""
    from PIL import Image

    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width > width:
        picture = picture.resize(
            (width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS
        )
    stream = io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
