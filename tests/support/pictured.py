"""Prompts with source pictures (large soft patches, seeded by their text), and folders of prompts."""

import io
import json
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image

from flowgrove.data.prompt import Picture, Prompt


def drawn_picture(text, number, width=56, height=40):
    """Picture `number` of a prompt, as the bytes of a PNG."""
    colours = np.random.default_rng([zlib.crc32(text.encode()), number]).integers(0, 256, (3, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR).save(file, "png")
    return file.getvalue()


def pictured(texts, count):
    """The texts, each with `count` source pictures of its own; 0: as they are."""
    if not count:
        return list(texts)
    return [
        Prompt(text, tuple(Picture(f"{text} {n}", text, content=drawn_picture(text, n)) for n in range(count)))
        for text in texts
    ]


def write_prompts(path, texts, count):
    """Writes a prompt file, with `count` pictures per row beside it; returns its path."""
    if not count:
        path = path.with_suffix(".txt")
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path
    rows = []
    for row, text in enumerate(texts):
        names = [f"{path.stem}_{row}_{number}.png" for number in range(count)]
        for number, name in enumerate(names):
            (path.parent / name).write_bytes(drawn_picture(text, number))
        rows.append({"prompt": text, "images": names})
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
