"""What a report tells of a run, as one object of JSON: the page draws it, and whoever serves it can serve it anew."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowgrove.recipe.keys import as_yaml, recipe_keys
from flowgrove.recipe.schema import Recipe
from flowgrove.report.findings import clip_range, find
from flowgrove.report.forests import forest_content
from flowgrove.report.lines import Line, evaluated_lines, total_reward, whole_lines
from flowgrove.report.pictures import Address, data_uri, pictures_of
from flowgrove.report.series import curves, mean, seconds_before, unshared_passes
from flowgrove.report.split_view import splits_fact
from flowgrove.run.metric_keys import METRICS


def run_content(recipe: Recipe, folder: Path, address: Address = data_uri) -> dict[str, Any]:
    """All that the page shows of a run, which need not have a line yet. `address`: where a browser finds a picture."""
    lines = whole_lines(recipe, folder)
    pictures = pictures_of(folder, address)
    text = folder / "recipe.yaml"
    return finite({
        "name": readable(folder.resolve().name),
        "iterations": len(lines),
        "planned": recipe.run.iterations,
        "facts": _facts(recipe, lines, pictures["changed"]) if lines else [],
        "findings": [asdict(finding) for finding in find(recipe, lines, pictures["changed"])],
        "clip_range": clip_range(recipe),
        **curves(recipe, lines),
        "pictures": pictures,
        "forests": forest_content(folder, address),
        "recipe": {
            "changed": _changed(recipe),
            "settings": flat(recipe.model_dump(mode="json")),
            "yaml": text.read_text(encoding="utf-8", errors="replace") if text.exists() else "",
        },
    })  # fmt: skip


def unread_content(name: str, error: str) -> dict[str, Any]:
    """What stands for a run that has nothing to show, and why."""
    recipe = {"changed": [], "settings": {}, "yaml": ""}
    return {"name": readable(name), "error": readable(error), "iterations": 0, "planned": 0, "recipe": recipe}


def metric_texts() -> dict[str, list[str]]:
    """{metric: [meaning, what is healthy, what to do else]}."""
    return {metric.key: [metric.meaning, metric.healthy, metric.otherwise] for metric in METRICS}


def flat(section: Any, prefix: str = "") -> dict[str, str]:
    """{dotted key: value as YAML on one line}; entries of lists of sections by number."""
    parts: list[tuple[str, Any]]
    if isinstance(section, dict):
        parts = list(section.items())
    elif isinstance(section, list) and any(isinstance(entry, dict) for entry in section):
        parts = [(str(place), entry) for place, entry in enumerate(section)]
    else:
        return {prefix.removesuffix("."): as_yaml(section)}
    return {key: value for name, part in parts for key, value in flat(part, f"{prefix}{name}.").items()}


def finite(content: Any) -> Any:
    """The same with None for numbers that JSON does not have, and text that UTF-8 has."""
    if isinstance(content, dict):
        return {readable(key): finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return readable(content) if isinstance(content, str) else content


def readable(text: str) -> str:
    """The text with a sign of replacement for what is no character, as in names of files."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _changed(recipe: Recipe) -> list[list[str]]:
    """[key, value, default] of every key that does not have its default."""
    defaults = {key.name: key.default for key in recipe_keys()}

    def default(key: str) -> str:
        found = defaults.get(".".join(part for part in key.split(".") if not part.isdecimal()), "")
        return "" if found == "required" else found

    changed = flat(recipe.model_dump(mode="json", exclude_defaults=True))
    return [[key, value, default(key)] for key, value in changed.items()]


def _facts(recipe: Recipe, lines: list[Line], prompts_changed: bool) -> list[list[str]]:
    """[name, value, note]."""
    held_out = evaluated_lines(lines, recipe.run.iterations)
    facts = []
    if held_out:
        (start, first), (done, last) = held_out[0], held_out[-1]
        width = last.get("eval_reward_confidence")
        notes = [f"{f'after {start} iterations' if start else 'base model'}, and after {done} iterations"]
        notes += [f"95 % interval ±\N{NO-BREAK SPACE}{width:.3f}"] if width else []
        notes += ["the held-out prompts changed in between"] if prompts_changed else []
        facts.append(["Held-out reward", _change(first["eval_reward"], last["eval_reward"]), "; ".join(notes)])
    else:
        facts.append(["Held-out reward", "not evaluated", "set data.eval_prompts and run.eval_every"])
    totals = [total_reward(recipe, line) for line in lines]
    facts.append(["Training reward", _change(totals[0], totals[-1]), "with exploration noise, other prompts each time"])
    seconds = seconds_before(lines)[-1]
    facts.append(["Iterations", f"{len(lines):,} of {recipe.run.iterations:,}", f"{seconds / len(lines):.2f} s each"])
    facts.append(["Time in stages", _duration(seconds), "without evaluations and checkpoints"])
    forwards, passes = ([line[key] for line in lines] for key in ("rollout_forwards", "train_passes"))
    each = f"{mean(forwards):,.0f} rollout forwards and {mean(passes):,.0f} train passes an iteration"
    if unshared := unshared_passes(recipe, lines):
        saved = [sum(loop[i] for loop in unshared) / max(1, sum(own)) for i, own in enumerate((forwards, passes))]
        facts.append(["Fewer rows than unshared", f"{saved[0]:.1f}× and {saved[1]:.1f}×", each])
    else:
        facts.append(["Rows", each, "without the model's folder not compared with the unshared loop"])
    facts += splits_fact(recipe, lines)
    facts.append(["Peak memory", f"{max(line['peak_memory_bytes'] for line in lines) / 2**30:.2f} GiB", ""])
    return facts


def _change(first: float, last: float) -> str:
    return f"{first:.3f} → {last:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
