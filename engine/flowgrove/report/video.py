"""Videos as files: H.264 in MP4, through PyAV."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowgrove.errors import UserError


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """frames uint8 [F, H, W, 3] → `path`. H.264 wants even sizes: an odd last row or column is repeated once.
    Raises UserError without PyAV.
    """
    try:
        import av
    except ImportError:
        raise UserError("writing videos needs PyAV: pip install av") from None
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        stream.time_base = Fraction(1, fps)
        for pixels in even:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
