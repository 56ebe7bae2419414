"""Samples of a run's model, or a recipe's base model, as files."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowgrove.device import pick_backend
from flowgrove.errors import UserError
from flowgrove.evaluation import draw
from flowgrove.files import write_file, write_text
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.models.sources import source_pictures, source_video
from flowgrove.ranks import Ranks
from flowgrove.report.grids import Grid, source_tiles
from flowgrove.report.side_by_side import draw_side_by_side
from flowgrove.report.video import write_mp4
from flowgrove.rewards.pixels import shrink, to_bytes
from flowgrove.run.finished_runs import open_model, open_recipe
from flowgrove.setup import Setup

_PROMPTS_PER_PAGE, _MOST_SAMPLES = 8, 4


def write_samples(
    source: Path,
    overrides: tuple[str, ...],
    wanted: Path | list[str],
    out: Path,
    compare: bool = False,
    which: str | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Samples as `out`/NNNN_K.png or .mp4 (prompt N, sample K) and prompts.jsonl; returns their number. Source pictures
    and videos lie beside them, scaled to cover the samples' size, NNNN_source_K.png and NNNN_source.mp4. Each of the
    `ranks` draws and writes its share of the prompts, the first one also what tells of them all.

    `wanted`: prompts, or a file of them in any format of data.prompts.
    `compare`: the base model's too, as NNNN_K_base, and both side by side on pages compare_PP.png. Raises UserError for
    a recipe: it has one model.
    """
    ranks = ranks or Ranks()

    def check() -> None:
        if compare and not source.is_dir():
            raise UserError("--compare sets a run's model beside its base model: give the folder of a run")

    ranks.together(check)
    recipe, checkpoint = open_recipe(source, overrides, which, ranks)
    setup = Setup(recipe)
    column = recipe.data.prompt_key
    prompts = (
        wanted if isinstance(wanted, list) else ranks.together(lambda: setup.read_prompts(wanted, "--prompts", column))
    )
    model = open_model(recipe, checkpoint, prompts, ranks)
    runner = ranks.together(lambda: PassRunner.of(model.recipe, model.policy))
    with ranks.together(lambda: pick_backend(model.recipe)):
        base = _write(setup, model.policy, runner, prompts, out, "_base", ranks) if compare else []
        model.restore(ranks)
        tuned = _write(setup, model.policy, runner, prompts, out, "", ranks)
    samples = model.recipe.run.eval.samples
    if compare:
        left, right = (ranks.gather_all(tiles).numpy() for tiles in (base, tuned))
        ranks.by_first(lambda: _compare(left, right, prompts, samples, out))
    return len(prompts) * samples


def _write(
    setup: Setup, policy: Policy, runner: PassRunner, prompts: list[str], out: Path, ending: str, ranks: Ranks
) -> list[Tensor]:
    """Draws this rank's samples and writes them; returns small pictures uint8 [n, h, w, 3] of them."""
    samples, share = setup.recipe.run.eval.samples, ranks.share(len(prompts))
    tiles: list[Tensor] = []
    lines: list[str] = []
    geometry = policy.adapter.geometry

    def work() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for number, prompt in enumerate(prompts[share], share.start):
            for place, source in enumerate(source_pictures(prompt, geometry.height, geometry.width)):
                write_file(out / f"{number:04d}_source_{place}.png", source.save)
            if (frames := source_video(prompt, geometry.height, geometry.width)) is not None:
                _write_video(
                    out / f"{number:04d}_source.mp4", np.stack([np.asarray(frame) for frame in frames]), geometry.fps
                )
        for some in draw(setup, policy, runner, prompts[share], share.start):
            for sample in some:
                prompt, number = divmod(share.start * samples + len(lines), samples)
                file = _save(out / f"{prompt:04d}_{number}{ending}", sample, policy.adapter.geometry.fps)
                lines.append(json.dumps({"file": file.name, "prompt": prompts[prompt]}, ensure_ascii=False) + "\n")
            tiles.append(to_bytes(shrink(some)))

    ranks.together(work)
    listed = "".join(ranks.tell("".join(lines)))
    ranks.by_first(lambda: write_text(out / f"prompts{ending}.jsonl", listed))
    return tiles


def _compare(base: NDArray[np.uint8], tuned: NDArray[np.uint8], prompts: list[str], samples: int, out: Path) -> None:
    """Pages with both models' small pictures [prompts · samples, h, w, 3] side by side."""
    for page, start in enumerate(range(0, len(prompts), _PROMPTS_PER_PAGE)):
        some = prompts[start : start + _PROMPTS_PER_PAGE]
        left, right = (
            _grid(tiles[start * samples : (start + len(some)) * samples], some, samples) for tiles in (base, tuned)
        )
        draw_side_by_side(left, right, ("base model", "trained"), out / f"compare_{page:02d}.png")


def _save(stem: Path, sample: Tensor, fps: int) -> Path:
    """A picture [3, H, W] as PNG, a video [F, 3, H, W] as MP4."""
    pixels = to_bytes(sample).numpy()
    if sample.ndim == 3:
        path = stem.with_name(stem.name + ".png")
        write_file(path, Image.fromarray(pixels).save)
    else:
        path = stem.with_name(stem.name + ".mp4")
        _write_video(path, pixels, fps)
    return path


def _write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    write_file(path, lambda partial: write_mp4(partial, frames, fps))


def _grid(tiles: NDArray[np.uint8], prompts: list[str], samples: int) -> Grid:
    whole = tiles.reshape(len(prompts), samples, *tiles.shape[1:])[:, :_MOST_SAMPLES]
    return Grid(whole, prompts, np.full(whole.shape[:2], np.nan), (), source_tiles(prompts, *whole.shape[2:4]))
