"""Prompt files, and which prompts an iteration takes: a pure function of (seed, iteration), so that a resumed run goes on where it stopped."""

import random
from functools import lru_cache
from pathlib import Path

from flowgrove.errors import UserError


def read_prompts(path: str | Path, key: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank. Raises UserError naming the recipe key."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}: cannot read {path} ({error.strerror}): give a text file with one prompt per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is not UTF-8 text: save it as UTF-8, one prompt per line") from None
    prompts = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {path} holds no prompt: write one per line")
    return prompts


def prompts_of_iteration(prompts: list[str], iteration: int, count: int, seed: int) -> list[str]:
    """`count` prompts: every pass over the file is a new seeded order, and passes follow each other without a gap."""
    chosen = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, index = divmod(position, len(prompts))
        chosen.append(prompts[_order(seed, epoch, len(prompts))[index]])
    return chosen


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"prompts/{seed}/{epoch}").sample(range(count), count)
