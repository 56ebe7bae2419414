"""The texts of a prompt file or folder: jsonl, json, parquet, csv, what datasets.save_to_disk writes, plain text.

Every reader takes the recipe key and the path for its errors, and the column that holds the prompts (None: prompt, caption or text).
"""

import csv
import json
import re
from collections.abc import Iterable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError

_COLUMNS = ("prompt", "caption", "text")  # taken in this order where data.prompt_key is null
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-(?P<count>\d{5})")
_SPLITS = ("train", "validation", "test")


def read_file(file: Path, key: str, column: str | None) -> list[str]:
    """The texts of one file, by its suffix."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet([file], key, column)
    if suffix in (".jsonl", ".json"):
        return _texts_of_rows(_read_json(file, key), file, key, column)
    if suffix in (".csv", ".tsv"):
        with file.open(encoding="utf-8-sig", newline="") as handle:
            return _texts_of_rows(list(csv.DictReader(handle, delimiter="\t" if suffix == ".tsv" else ",")), file, key, column)
    return read_text(file)


def read_text(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig").splitlines()


def _read_json(file: Path, key: str) -> list[dict[str, Any]]:
    """Objects; a bare string is an object with a prompt."""
    content = file.read_text(encoding="utf-8-sig")
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except ValueError as error:
            raise UserError(f"{key}: {file} is not JSON ({error}): write a list of objects, or one object per line") from None
    else:
        rows = _json_lines(content.split("\n"), file, key)  # a JSON string may hold the other line ends of Unicode
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict | str):
            raise UserError(f'{key}: entry {number} of {file} is {str(row)[:40]}: write an object like {{"prompt": "..."}} or a string')
    return [row if isinstance(row, dict) else {"prompt": row} for row in rows]


def _json_lines(lines: list[str], file: Path, key: str) -> list[Any]:
    """All lines in one call, which takes a third of the time; one by one only to name the line that is wrong."""
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        rows = json.loads(f"[{','.join(line for _, line in filled)}]")
    except ValueError:
        rows = []
    if len(rows) == len(filled):
        return rows
    rows = []
    for number, line in filled:
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f'{key}: line {number} of {file} is not JSON ({error}): write one object per line, like {{"prompt": "..."}}') from None
    return rows


def _texts_of_rows(rows: list[dict[str, Any]], file: Path, key: str, column: str | None) -> list[str]:
    if not rows:
        return []
    name = _pick_column(dict.fromkeys(chain.from_iterable(rows)), file, key, column)
    texts = [text for row in rows if (text := row.get(name)) is not None]
    if (wrong := next((text for text in texts if not isinstance(text, str)), None)) is not None:
        raise _not_text(file, key, name, f"values like {str(wrong)[:40]}")
    return texts


def read_folder(folder: Path, key: str, column: str | None) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if "train" not in splits:
            raise UserError(f"{key}: {folder} holds the splits {', '.join(splits)} and no train: write one of them, like {folder / splits[0]}")
        folder = folder / "train"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _read_saved(folder, key, column)
    for pattern in ("*.parquet", "data/*.parquet", "train/*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return _read_parquet(_one_split(files, folder, key), key, column)
    raise UserError(f"{key}: {folder} is a folder without prompts: give a file, a folder written by datasets.save_to_disk, or one with parquet files")


def _read_saved(folder: Path, key: str, column: str | None) -> list[str]:
    """A dataset as datasets.save_to_disk writes it: Arrow streams, listed in state.json."""
    arrow = _pyarrow("pyarrow", folder, key)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise UserError(f"{key}: {folder} is a selection of rows saved by an old version of datasets: load it and save it again with save_to_disk")
    texts: list[str] = []
    for file in (folder / entry["filename"] for entry in state["_data_files"]):
        with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as stream:
            name = _pick_column(stream.schema.names, folder, key, column)
            for batch in stream:
                texts += _strings(batch.column(name), folder, key, name)
    return texts


def _read_parquet(files: list[Path], key: str, column: str | None) -> list[str]:
    parquet = _pyarrow("pyarrow.parquet", files[0], key)
    texts: list[str] = []
    for file in files:
        with parquet.ParquetFile(file) as table:
            name = _pick_column(table.schema_arrow.names, file, key, column)
            for batch in table.iter_batches(columns=[name]):  # in batches: an array holds at most 2 GiB of text
                texts += _strings(batch.column(0), file, key, name)
    return texts


def _strings(values: Any, file: Path, key: str, name: str) -> list[str]:
    """The values of an Arrow array that are not null. Raises UserError for another type than text."""
    types = _pyarrow("pyarrow", file, key).types
    kind = values.type.value_type if types.is_dictionary(values.type) else values.type
    if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise _not_text(file, key, name, f"the type {values.type}")
    return [text for text in values.to_pylist() if text is not None]


def _one_split(files: list[Path], folder: Path, key: str) -> list[Path]:
    """The files of train, or of the only split; names are like train-00000-of-00002.parquet. A shard that is missing is an error."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.match(file.stem)
        splits.setdefault(shard["split"] if shard else file.stem if file.stem in _SPLITS else "", []).append(file)
    if len(splits) > 1 and "train" not in splits:
        raise UserError(f"{key}: {folder} holds several splits and no train: give one file, like {files[0]}")
    chosen = splits.get("train", files)
    if not complete(chosen):
        raise UserError(f"{key}: {folder} holds {len(chosen)} of the shards that {chosen[0].name} belongs to: download all of them")
    return chosen


def complete(shards: list[Path]) -> bool:
    shard = _SHARD.match(shards[0].stem)
    return shard is None or len(shards) == int(shard["count"])


def _pick_column(columns: Iterable[str], file: Path, key: str, column: str | None) -> str:
    names = list(columns)
    for name in _COLUMNS if column is None else (column,):
        if name in names:
            return name
    lacks = "no column prompt, caption or text" if column is None else f"no column {column}"
    raise UserError(f"{key}: {file} has {lacks}: write data.prompt_key: one of {', '.join(names)}")


def _not_text(file: Path, key: str, name: str, what: str) -> UserError:
    return UserError(f"{key}: the column {name} of {file} holds {what}: write data.prompt_key: a column of text")


def _pyarrow(module: str, file: Path, key: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{key}: {file} is read with pyarrow, which is not installed: pip install pyarrow") from None
