"""By what recipes are judged: two are comparable where all that decides the held-out reward, but for the weights, is
the same in effect, however it is written. A comparison's folder keeps it, so that no later start judges otherwise.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from flowgrove.data.prompt import described
from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.models.families import configuration_folder, read_geometry
from flowgrove.recipe.deciding import judges
from flowgrove.recipe.loading import load_recipe
from flowgrove.run.finding import valid_checkpoints
from flowgrove.run.resume import phrase
from flowgrove.setup import Setup

_PROMPTS = "data.eval_prompts"
_NAME = "evaluation.json"


def judged(setup: Setup) -> dict[str, Any]:
    """What decides the held-out reward of given weights, by the recipe key that changes it, as JSON values: null in a
    recipe is what it stands for, and prompts are a hash of their rows. Raises UserError for files that cannot be read.
    """
    recipe, settings = setup.recipe, setup.recipe.run.eval
    geometry = read_geometry(configuration_folder(recipe.model), recipe.model)
    steps = setup.eval_plan.steps
    model = recipe.model
    guidance = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    guided = guidance > 1  # else nothing reads what is said of it
    initial = model.init_lora
    return {
        "model.path": model.path,
        "model.init_lora": None if initial is None else initial.model_dump(mode="json"),
        "model.base_precision": model.base_precision,
        "model.negative_prompt": model.negative_prompt if guided else None,
        "model.cfg_normalization": model.cfg_normalization if guided else None,
        "model.guidance_scale_2": model.guidance_scale_2 if settings.guidance_scale is None else None,
        "model.height": geometry.height,
        "model.width": geometry.width,
        "model.frames": geometry.frames,
        "model.text_tokens": geometry.prompt_tokens,
        "run.eval.steps": len(steps),
        "rollout.shift": [[step.sigma, step.sigma_next, step.solver] for step in steps],
        "run.eval.guidance_scale": guidance,
        "run.eval.samples": settings.samples,
        "run.eval.tuned_share": settings.tuned_share,
        _PROMPTS: hashlib.sha256(json.dumps([described(text) for text in setup.eval_prompts]).encode()).hexdigest(),
        "reward": judges(recipe),
    }


def keep_judged(out: Path, setup: Setup) -> None:
    """Writes what the runs of the comparison in `out` are judged by into evaluation.json."""
    write_text(out / _NAME, json.dumps(_lasting(setup), indent=1) + "\n")


def check_judged(out: Path, setup: Setup) -> None:
    """Raises UserError if the comparison in `out` holds runs that were judged by something else than `setup`. Without
    evaluation.json the recipe in the folder of one of them tells.
    """
    begun = [run for run in sorted((out / "runs").glob("*")) if valid_checkpoints(run)]
    if not begun:
        return
    try:
        there = json.loads((out / _NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = _lasting(Setup(load_recipe(begun[0] / "recipe.yaml")))
    except ValueError:
        raise UserError(f"{out / _NAME} is damaged: give another --out, or remove that file") from None
    here = _lasting(setup)
    found = [(key, value, there.get(key)) for key, value in here.items() if value != there.get(key)]
    told = [phrase([one for one in found if one[0] != _PROMPTS])] if any(key != _PROMPTS for key, *_ in found) else []
    if any(key == _PROMPTS for key, *_ in found):
        told.append(f"{_PROMPTS} holds other prompts than when it began")
    if told:
        raise UserError(
            f"{out / 'runs'} holds runs that were judged otherwise: {', '.join(told)}: give another --out, or remove "
            "that folder"
        )


def _lasting(setup: Setup) -> dict[str, Any]:
    """Without where the model lies, and without the rewards, which the fingerprint of every run holds."""
    found = judged(setup)
    found.pop("reward")
    return {**found, "model.path": Path(found["model.path"]).name}
