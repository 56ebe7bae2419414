"""TensorBoard's event files, written without a thread of TensorBoard's own: an error is raised where it happens."""

import io
import itertools
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, flat, rows

_number = itertools.count()  # of files that one process begins in one second


class TensorBoard:
    """Scalars, the recipe as text and as hyperparameters, and a picture per held-out prompt, in the run's folder
    `tensorboard`. What stands there of iterations that will be run again is taken back.
    """

    def open(self, opening: Opening) -> Opened:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = Path(opening.folder) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._records = RecordWriter((folder / f"events.out.tfevents.{name}").open("xb"))
        first = opening.first_iteration
        self._write(file_version="brain.Event:2")
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))
        values = {key: _hyperparameter(value) for key, value in flat(opening.recipe).items()}
        self._write(step=first, summary=hparams_pb(values))
        self._write(step=first, summary=_text("recipe", yaml.safe_dump(opening.recipe, sort_keys=False)))
        return Opened()

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, value in values.items():
            self._write(step=iteration, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def pictures(self, completed: int, pictures: Pictures) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        for row, (picture, caption) in enumerate(rows(pictures)):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "png")
            height, width, _ = picture.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
            told = SummaryMetadata(summary_description=caption)
            self._write(
                step=completed, summary=Summary(value=[Summary.Value(tag=f"samples/{row}", image=image, metadata=told)])
            )

    def close(self, status: Status) -> None:
        self._records.close()

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def _hyperparameter(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _text(tag: str, text: str) -> Any:
    """A summary that TensorBoard shows as a block of code."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text.metadata import create_summary_metadata

    block = "".join(f"    {line}\n" for line in text.splitlines())
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[block.encode()], tensor_shape=shape)
    told = create_summary_metadata(display_name=tag, description="the recipe, with all defaults")
    return Summary(value=[Summary.Value(tag=f"{tag}/text_summary", tensor=tensor, metadata=told)])
