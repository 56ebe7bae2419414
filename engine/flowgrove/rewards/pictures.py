"""Pictures as HTTP rewards send them: PNG (lossless, 8 bits), in base64."""

import base64
import io

from PIL import Image
from torch import Tensor


def png_base64(picture: Tensor) -> str:
    """uint8 [H, W, 3] on the CPU → the base64 text of its PNG file."""
    return file_base64(Image.fromarray(picture.numpy()))


def file_base64(picture: Image.Image) -> str:
    """The base64 text of a picture's PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # fast: the file lives for one request
    return base64.b64encode(file.getvalue()).decode("ascii")
