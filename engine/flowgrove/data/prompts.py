"""Prompts from files, folders and public sets, and which of them an iteration takes: a pure function of (seed,
iteration), so that a resumed run goes on where it stopped.

    NAME.jsonl, NAME.json     an object or a string per line, or one list of them
    NAME.csv, NAME.tsv        one column of it; the first line names the columns
    NAME.parquet              one column of it
    a folder                  written by datasets.save_to_disk (a DatasetDict: its train split), or with parquet files
                              as downloaded from the hub
    a name of NAMED_SETS      that public set in the local Hugging Face cache; nothing is ever downloaded
    anything else             UTF-8 text, one prompt per line; only LF and CR LF end one

Rows of the files with columns may hold more (`Columns`): their prompts are then of the class Prompt.
"""

import random
import shlex
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from flowgrove.data.columns import Columns
from flowgrove.data.prompt import with_text
from flowgrove.data.readers import MOST_CHARACTERS, MOST_PROMPTS, complete, read_file, read_folder, too_much
from flowgrove.errors import UserError, one_line
from flowgrove.hub import cached_snapshot
from flowgrove.paths import exists, local

TEXT_ALONE = Columns()


class NamedSet(NamedTuple):
    """A dataset repository on the Hugging Face hub:
    patterns of the files in it, and the column that holds the prompts.
    """

    repository: str
    files: tuple[str, ...]
    column: str


# Each prompt counts once. Left out: sets without a dataset repository of their own (GenEval, the OCR prompts of
# Flow-GRPO); their text files work as files.
NAMED_SETS = {
    "hpdv2": NamedSet("ymhao/HPDv2", ("train.json",), "prompt"),
    "hpdv2_benchmark": NamedSet(
        "ymhao/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        "prompt",
    ),
    "pickapic_v1": NamedSet("yuvalkirstain/pickapic_v1_no_images", ("data/train-*.parquet",), "caption"),
    "pickapic_v1_test": NamedSet("yuvalkirstain/pickapic_v1_no_images", ("data/test_unique-*.parquet",), "caption"),
    "pickapic_v2": NamedSet("yuvalkirstain/pickapic_v2_no_images", ("data/train-*.parquet",), "caption"),
    "pickapic_v2_test": NamedSet("yuvalkirstain/pickapic_v2_no_images", ("data/test_unique-*.parquet",), "caption"),
    "drawbench": NamedSet("sayakpaul/drawbench", ("DrawBench Prompts - Sheet1.csv",), "Prompts"),
    "parti_prompts": NamedSet("nateraw/parti-prompts", ("PartiPrompts.tsv",), "Prompt"),
}


def read_prompts(path: str | Path, key: str, prompt_key: str | None = None, columns: Columns = TEXT_ALONE) -> list[str]:
    """The prompts that are not blank, in their order, runs of white space as one space.

    `prompt_key`: the column of a jsonl, csv, tsv, parquet or datasets file (null: prompt, caption or text); text files
    and named sets have no use for it. `columns`: what is wanted of the others.
    A file or folder wins over a named set of the same name. Raises UserError naming the recipe key `key`.
    """
    place = local(path, key)
    named = None if exists(place) else NAMED_SETS.get(str(path))
    try:
        if named is not None:
            files = _cached(str(path), named, key)
            found = [text for file in files for text in read_file(file, key, named.column, TEXT_ALONE)]
        elif place.is_dir():
            found = read_folder(place, key, prompt_key, columns)
        else:
            found = read_file(place, key, prompt_key, columns)
        prompts = _tidy(found, key, path)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is not UTF-8 text: save it as UTF-8, one prompt per line") from None
    except Exception as error:  # the readers of damaged files raise whatever they stumble over
        reason = getattr(error, "strerror", None) or one_line(str(error), 300) or type(error).__name__
        kinds = "a text file with one prompt per line, a jsonl, csv, tsv or parquet file, a datasets folder"
        sources = f"{kinds}, or one of {', '.join(NAMED_SETS)}"
        raise UserError(f"{key}: cannot read {path} ({reason}): give {sources}") from None
    if not prompts:
        raise UserError(f"{key}: {path} holds no prompt: write one per line")
    return prompts if named is None else list(dict.fromkeys(prompts))


def _tidy(texts: list[str], key: str, path: str | Path) -> list[str]:
    """The texts that are not blank, runs of white space as one space. Raises UserError for what no encoder reads."""
    if len(texts) > MOST_PROMPTS or sum(map(len, texts)) > MOST_CHARACTERS:
        raise too_much(path, key)
    prompts = [with_text(text, tidy) for text in texts if (tidy := " ".join(text.split()))]
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            what = f"prompt {number} of {path} holds half a character (a lone surrogate)"
            raise UserError(f"{key}: {what}: correct {prompt[:60]}") from None
        if "\0" in prompt:
            what = f"prompt {number} of {path} holds a NUL character"
            raise UserError(f"{key}: {what}: the file is no text, or is not saved as UTF-8")
    return prompts


def cut_alike(prompts: Sequence[str], read: Callable[[str], Hashable]) -> str | None:
    """What to say of prompts that differ only beyond what the encoders read; None if there are none.

    `read`: what the encoders see of a prompt, all of them together, after their limit (such as tuples of token ids).
    """
    first: dict[Hashable, str] = {}
    pairs = ((prompt, first.setdefault(read(prompt), prompt)) for prompt in dict.fromkeys(prompts))
    lost = [pair for pair in pairs if pair[0] != pair[1]]
    if not lost:
        return None
    example = f"the first: {one_line(lost[0][0], 80)!r} and {one_line(lost[0][1], 80)!r}"
    return (
        f"{len(lost)} prompts differ from others only after the text encoders' limit and train as the same "
        f"({example}): "
        "shorten them, or raise model.text_tokens where the model allows it"
    )


def prompts_of_iteration(prompts: list[str], iteration: int, count: int, seed: int) -> list[str]:
    """`count` prompts: every pass over the file is a new seeded order, and passes follow each other without a gap."""
    chosen = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, index = divmod(position, len(prompts))
        chosen.append(prompts[_order(seed, epoch, len(prompts))[index]])
    return chosen


def prompts_of_run(prompts: list[str], iterations: int, count: int, seed: int) -> list[str]:
    """What `prompts_of_iteration` takes in that many iterations, each line once, in the order of its first use."""
    return [prompts[index] for index in _order(seed, 0, len(prompts))[: iterations * count]]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"prompts/{seed}/{epoch}").sample(range(count), count)


def _cached(name: str, named: NamedSet, key: str) -> list[Path]:
    """The set's files in the Hugging Face cache. Raises UserError with the command that puts them there."""
    folder = cached_snapshot(named.repository, "dataset")
    found = [] if folder is None else [sorted(folder.glob(pattern)) for pattern in named.files]
    if not found or not all(files and complete(files) for files in found):
        wanted = " ".join(f"--include {shlex.quote(pattern)}" for pattern in named.files)
        command = f"hf download --repo-type dataset {named.repository} {wanted}"
        raise UserError(
            f"{key}: the prompt set {name} is not in the Hugging Face cache: run `{command}`, "
            "or give the path of a file or folder instead"
        )
    return [file for files in found for file in files]
