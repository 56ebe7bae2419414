"""Prompts with source pictures and videos (large soft patches, seeded by their text), and folders of prompts."""

import io
import json
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image

from flowgrove.data.prompt import Picture, Prompt
from flowgrove.data.sources import Video


def drawn_picture(text, number, width=56, height=40):
    """Picture `number` of a prompt, as the bytes of a PNG."""
    colours = np.random.default_rng([zlib.crc32(text.encode()), number]).integers(0, 256, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR).save(file, "png")
    return file.getvalue()


def drawn_video(text, frames, width=56, height=40):
    """The video of a prompt, as the bytes of a GIF."""
    pictures = [Image.open(io.BytesIO(drawn_picture(text, 100 + n, width, height))) for n in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, "gif", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def pictured(texts, count, frames=0):
    """The texts, each with `count` source pictures of its own and a video of so many frames; 0: as they are."""
    if not (count or frames):
        return list(texts)
    return [
        Prompt(
            text,
            tuple(Picture(f"{text} {n}", text, content=drawn_picture(text, n)) for n in range(count)),
            video=Video(text, text, content=drawn_video(text, frames), frames=frames) if frames else None,
        )
        for text in texts
    ]


def write_prompts(path, texts, count, frames=0):
    """Writes a prompt file, with `count` pictures per row beside it and a video of so many frames; returns its path."""
    if not (count or frames):
        path = path.with_suffix(".txt")
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path
    rows = []
    for row, text in enumerate(texts):
        names = [f"{path.stem}_{row}_{number}.png" for number in range(count)]
        for number, name in enumerate(names):
            (path.parent / name).write_bytes(drawn_picture(text, number))
        row_of = {"prompt": text, "images": names} if count else {"prompt": text}
        if frames:
            row_of["video"] = f"{path.stem}_{row}.gif"
            (path.parent / row_of["video"]).write_bytes(drawn_video(text, frames))
        rows.append(row_of)
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def saved(folder, columns, shards=1, **state):
    """A folder as datasets.save_to_disk writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    size = -(-table.num_rows // shards)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(number * size, size), max_chunksize=2)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", **state})
    )
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder
