"""The prompts of a file or folder: jsonl, json, parquet, csv, tsv, what datasets.save_to_disk writes, plain text.

Every reader takes the recipe key and the path for its errors, the column that holds the texts (None: prompt, caption or
text), and what is wanted of the others.
"""

import csv
import io
import json
import re
from collections.abc import Iterable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from flowgrove.data.columns import Chosen, Columns, Room, with_columns
from flowgrove.errors import UserError
from flowgrove.paths import check_regular, read_bytes

_COLUMNS = ("prompt", "caption", "text")  # taken in this order where data.prompt_key is null
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-(?P<count>\d{5})")
_SPLITS = ("train", "validation", "test")
MOST_PROMPTS, MOST_CHARACTERS = 4_000_000, 1 << 28
_MOST_BYTES = 1 << 29  # of a text file; of a column of a parquet file, uncompressed
_POINTER = "version https://git-lfs.github.com/spec/"
_BATCH = 256  # rows: one text that stands in each of them is held that often


def read_file(file: Path, key: str, column: str | None, columns: Columns) -> list[str]:
    """The prompts of one file, by its suffix."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet([file], key, column, columns)
    if suffix in (".jsonl", ".json"):
        return _prompts_of_rows(_read_json(file, key), file, key, column, columns)
    if suffix in (".csv", ".tsv"):
        return _read_table(file, key, column, columns)
    return _text(file, key).replace("\r\n", "\n").split("\n")  # other line ends of Unicode may stand in a prompt


def _text(file: Path, key: str) -> str:
    content = read_bytes(file, _MOST_BYTES, f"{key}:").decode("utf-8-sig")
    if content.startswith(_POINTER):
        raise UserError(f"{key}: {file} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
    if content.count("\n") > 2 * MOST_PROMPTS:
        raise UserError(f"{key}: {file} has more than {2 * MOST_PROMPTS:,} lines: give a part of it")
    return content


def _read_table(file: Path, key: str, column: str | None, columns: Columns) -> list[str]:
    """The prompts of a csv or tsv file, whose first line names the columns."""
    content, tabs = _text(file, key), file.suffix.lower() == ".tsv"
    rows = csv.reader(io.StringIO(content, newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        found = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        if not tabs:
            what = f"line {rows.line_num} of {file} is not CSV ({error})"
            wanted = "put quotes round a text with commas, and write its own quotes twice"
            raise UserError(f"{key}: {what}: {wanted}") from None
        lines = content.replace("\r\n", "\n").split("\n")
        found = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line]
    if not found:
        return []
    (_, names), texts = found[0], []
    name = _pick_column(names, file, key, column)
    if names.count(name) > 1:
        raise UserError(f"{key}: {file} has {names.count(name)} columns {name}: give each a name of its own")
    place, chosen = names.index(name), columns.of(names, name, file, key)
    for number, row in found[1:]:
        if any(text.strip() for text in row[len(names) :]):
            what = f"line {number} of {file} has {len(row)} fields, but there are {len(names)} columns"
            raise UserError(f"{key}: {what}: put quotes round a text with {'tabs' if tabs else 'commas'}")
        if chosen is None:
            texts += row[place : place + 1]
        elif len(row) > place:
            cells: dict[str, str | None] = dict(zip(names, row, strict=False))
            if chosen.negative is not None and not cells.get(chosen.negative):
                cells[chosen.negative] = None  # an empty cell says nothing
            texts.append(chosen.prompt(row[place], cells, number))
    return texts


def _read_json(file: Path, key: str) -> list[dict[str, Any]]:
    """Objects; a bare string is an object with a prompt."""
    content = _text(file, key)
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{key}: {file} is not JSON ({error}): write a list of objects, or one object per line"
            ) from None
    else:
        rows = _json_lines(content.split("\n"), file, key)  # a JSON string may hold the other line ends of Unicode
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict | str):
            raise UserError(
                f'{key}: entry {number} of {file} is {str(row)[:40]}: write an object like {{"prompt": '
                f'"..."}} or a string'
            )
    return [row if isinstance(row, dict) else {"prompt": row} for row in rows]


def _json_lines(lines: list[str], file: Path, key: str) -> list[Any]:
    """All lines in one call, which takes a third of the time; one by one only to name the line that is wrong."""
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        separator = ",\n"  # a line end ends a string too, so no text reaches from one line into the next
        rows = json.loads(f"[{separator.join(line for _, line in filled)}]")
    except (ValueError, RecursionError):
        rows = []
    if len(rows) == len(filled):
        return rows
    rows = []
    for number, line in filled:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{key}: line {number} of {file} is not JSON ({error}): write one object per line, like {{"prompt": '
                f'"..."}}'
            ) from None
    return rows


def _prompts_of_rows(
    rows: list[dict[str, Any]], file: Path, key: str, column: str | None, columns: Columns
) -> list[str]:
    if not rows:
        return []
    names = dict.fromkeys(chain.from_iterable(rows))
    name = _pick_column(names, file, key, column)
    texts = [row.get(name) for row in rows]
    if (wrong := next((text for text in texts if not isinstance(text, str | None)), None)) is not None:
        raise _not_text(file, key, name, f"values like {str(wrong)[:40]}")
    chosen = columns.of(names, name, file, key)
    return [text for text in texts if text is not None] if chosen is None else with_columns(texts, rows, chosen, 1)


def read_folder(folder: Path, key: str, column: str | None, columns: Columns) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads(_text(folder / "dataset_dict.json", key))["splits"]
        if "train" not in splits:
            raise UserError(
                f"{key}: {folder} holds the splits {', '.join(splits)} and no train: write one of them, "
                f"like {folder / splits[0]}"
            )
        folder = folder / "train"
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _read_saved(folder, key, column, columns)
    for pattern in ("*.parquet", "data/*.parquet", "train/*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return _read_parquet(_one_split(files, folder, key), key, column, columns)
    raise UserError(
        f"{key}: {folder} is a folder without prompts: give a file, a folder written by datasets.save_to_disk, "
        "or one with parquet files"
    )


def _read_saved(folder: Path, key: str, column: str | None, columns: Columns) -> list[str]:
    """A dataset as datasets.save_to_disk writes it: Arrow streams, listed in state.json."""
    arrow = _pyarrow("pyarrow", folder, key)
    state = json.loads(_text(folder / "state.json", key))
    if state.get("_indices_data_files"):
        raise UserError(
            f"{key}: {folder} is a selection of rows saved by an old version of datasets: "
            "load it and save it again with save_to_disk"
        )
    found = _Found(key)
    for file in (folder / entry["filename"] for entry in state["_data_files"]):
        check_regular(file, f"{key}:")
        with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as stream:
            name = _pick_column(stream.schema.names, folder, key, column)
            chosen = columns.of(stream.schema.names, name, folder, key, found.room)
            for batch in stream:
                found.add(batch, folder, name, chosen)
    return found.prompts


def _read_parquet(files: list[Path], key: str, column: str | None, columns: Columns) -> list[str]:
    parquet = _pyarrow("pyarrow.parquet", files[0], key)
    found = _Found(key)
    for file in files:
        if check_regular(file, f"{key}:") < 1000 and file.read_bytes().startswith(_POINTER.encode()):
            raise UserError(f"{key}: {file} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
        with parquet.ParquetFile(file) as table:
            name = _pick_column(table.schema_arrow.names, file, key, column)
            index = table.schema_arrow.names.index(name)
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            if table.metadata.num_columns == len(table.schema_arrow.names):  # none is nested
                size = sum(group.column(index).total_uncompressed_size for group in groups)
                if size > _MOST_BYTES:
                    raise UserError(f"{key}: the column {name} of {file} takes {size >> 20:,} MiB: give a part of it")
            chosen = columns.of(table.schema_arrow.names, name, file, key, found.room)
            for batch in table.iter_batches(_BATCH, columns=[name, *(() if chosen is None else chosen.names)]):
                found.add(batch, file, name, chosen)
    return found.prompts


def too_much(file: Path | str, key: str) -> UserError:
    most = f"{MOST_PROMPTS:,} prompts or {MOST_CHARACTERS:,} characters"
    return UserError(f"{key}: {file} holds more than {most}: give a part of it")


class _Found:
    """The prompts of Arrow's batches."""

    def __init__(self, key: str) -> None:
        self.key, self.prompts, self.room = key, list[str](), Room()
        self._characters = self._rows = 0

    def add(self, batch: Any, file: Path, name: str, chosen: Chosen | None) -> None:
        """Those of one batch, some at a time: a small file may hold much. Raises UserError."""
        for start in range(0, len(batch), _BATCH):
            some = batch.slice(start, _BATCH)
            texts = _strings(some.column(name), file, self.key, name)
            self._characters += sum(len(text) for text in texts if text is not None)
            if self._characters > MOST_CHARACTERS or len(self.prompts) + len(texts) > MOST_PROMPTS:
                raise too_much(file, self.key)
            if chosen is None:
                self.prompts += [text for text in texts if text is not None]
            else:
                self.prompts += with_columns(texts, some.select(chosen.names).to_pylist(), chosen, self._rows + 1)
            self._rows += len(texts)


def _strings(values: Any, file: Path, key: str, name: str) -> list[str | None]:
    """The values of an Arrow array. Raises UserError for another type than text."""
    types = _pyarrow("pyarrow", file, key).types
    kind = values.type.value_type if types.is_dictionary(values.type) else values.type
    if not any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)):
        raise _not_text(file, key, name, f"the type {values.type}")
    found: list[str | None] = values.to_pylist()
    return found


def _one_split(files: list[Path], folder: Path, key: str) -> list[Path]:
    """The files of train, or of the only split; names are like train-00000-of-00002.parquet.
    A shard that is missing is an error.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        shard = _SHARD.match(file.stem)
        splits.setdefault(shard["split"] if shard else file.stem if file.stem in _SPLITS else "", []).append(file)
    if len(splits) > 1 and "train" not in splits:
        raise UserError(f"{key}: {folder} holds several splits and no train: give one file, like {files[0]}")
    chosen = splits.get("train", files)
    if not complete(chosen):
        raise UserError(
            f"{key}: {folder} holds {len(chosen)} of the shards that {chosen[0].name} belongs to: download all of them"
        )
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
