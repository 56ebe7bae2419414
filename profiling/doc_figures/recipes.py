"""The shipped recipes: what they are, count and need; what the shapes_* have reached and cost; plans as drawn."""

import io
from collections.abc import Iterator
from functools import partial

from rich.console import Console

from doc_figures.plan_memory import DIVIDED_FLUX, MEMORY, WHOLE_FLUX, Planned, peak_gib, predictions_in, shipped
from doc_figures.registry import ROOT, Rows, block, numbers, table, version
from flowgrove.recipe.schema import Recipe
from flowgrove.report.plan_view import draw_memory, draw_ranks, forest_lines

TIMINGS = "compare_timings.csv"
_PEAK = "(flowgrove plan RECIPE --memory)"
_MODELS = {
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "FLUX.1-Kontext-dev",
    "stabilityai/stable-diffusion-3.5-medium": "SD3.5-Medium",
    "Qwen/Qwen-Image": "Qwen-Image",
    "Qwen/Qwen-Image-Edit": "Qwen-Image-Edit",
    "Tongyi-MAI/Z-Image-Turbo": "Z-Image-Turbo",
    "black-forest-labs/FLUX.2-klein-base-4B": "FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.2-dev": "FLUX.2-dev",
    "lodestones/Chroma1-HD": "Chroma1-HD",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Wan2.1-1.3B",
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": "Wan2.1-VACE-1.3B",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "Wan2.1-I2V-14B",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "Wan2.2-A14B",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Wan2.2-5B",
    "Lightricks/LTX-Video": "LTX-Video",
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": "HunyuanVideo-1.5",
}
# a line of the table each: its recipes, and what they are; {…} comes from the first of them
_PUBLISHED = (
    (("dance_flux",), "DanceGRPO, {pictures} pictures, {share} % of {steps} steps"),
    (("mix_flux",), "MixGRPO, {pictures} pictures, window {window} of {all_steps}"),
    (("mix_flash_flux", "mix_flash_star_flux"), "MixGRPO-Flash, and with a frozen window"),
    (("branch_flux",), "BranchGRPO, a tree of {pictures} leaves, depth pruning"),
    (("branch_mix_flux",), "BranchGRPO-Mix"),
    (("branch_mix_flash_flux",), "BranchGRPO-Mix with Flash's tail: ours"),
    (("grove_flux",), "ours, untuned: a tree of {pictures} leaves, split in the first 2 steps, Flash's tail"),
    (("fast_flux",), "Flow-GRPO-Fast, {pictures} pictures"),
    (("flow_kontext",), "Flow-GRPO, edits, {pictures} pictures"),
    (("flow_sd35m",), "Flow-GRPO, {pictures} pictures"),
    (("fast_sd35m",), "Flow-GRPO-Fast"),
    (("mix_sd35m",), "MixGRPO"),
    (("grove_sd35m",), "ours, untuned"),
    (("mix_qwen",), "MixGRPO with Flow-GRPO's values, {pictures} pictures, window {window} of {all_steps}"),
    (("flow_qwen_edit",), "Flow-GRPO, edits, {pictures} pictures"),
    (("mix_z_image",), "MixGRPO, untuned"),
    (("mix_flux2_klein",), "MixGRPO, untuned"),
    (("grove_flux2",), "ours, untuned"),
    (("mix_chroma",), "MixGRPO, untuned"),
    (("flow_wan",), "Flow-GRPO, {pictures} videos"),
    (("grove_wan",), "ours, untuned"),
    (("grove_wan_vace",), "ours, untuned; videos that follow a video"),
    (("grove_wan_i2v",), "ours, untuned; videos that begin with a picture"),
    (("grove_wan22",), "ours, untuned; the high-noise expert"),
    (("grove_wan22_5b",), "ours, untuned"),
    (("mix_ltx",), "MixGRPO, untuned"),
    (("grove_hunyuan15",), "ours, untuned"),
)
SHAPES = {
    "shapes_dance": "DanceGRPO, {share} % of steps",
    "shapes_flow": "Flow-GRPO",
    "shapes_flow_fast": "Flow-GRPO-Fast",
    "shapes_mix": "MixGRPO",
    "shapes_mix_flash": "MixGRPO-Flash",
    "shapes_branch": "BranchGRPO, depth pruning",
    "shapes_branch_mix": "BranchGRPO-Mix",
    "shapes_branch_mix_flash": "BranchGRPO-Mix with Flash's tail",
    "shapes_grove": "ours: a tree of {pictures} leaves, split in the first 2 steps, Flash's tail",
}


def facts_of(recipe: Recipe) -> dict[str, str]:
    """What the descriptions name."""
    rollout = recipe.rollout
    return {
        "pictures": f"{rollout.group_size}",
        "share": f"{100 * recipe.update.step_fraction:.0f}",
        "steps": f"{rollout.steps - 1}",  # the last is never stochastic
        "all_steps": f"{rollout.steps}",
        "window": f"{rollout.window.size}",
    }


def _model(recipe: Recipe) -> str:
    model = recipe.model
    size = f"{model.height}²" if model.height == model.width else f"{model.height} × {model.width}"
    frames = f" × {model.frames}" if model.frames and model.frames > 1 else ""
    lora = f", LoRA {model.lora.rank}" if model.lora else ""
    return f"{_MODELS[str(model.path)]} {size}{frames}{lora}"


@block("docs/algorithms.md", MEMORY, origin=f"recipes/*.yaml and profiling/figures/{MEMORY}")
def shipped_recipes(memory: Rows) -> str:
    named = sorted(name for names, _ in _PUBLISHED for name in names)
    if named != shipped():
        raise ValueError(f"docs/algorithms.md lists {named}, recipes/ holds {shipped()}")
    lines, above = [], ""
    for names, text in _PUBLISHED:
        recipe = Planned(names[0]).load()
        model, facts = _model(recipe), facts_of(recipe)
        plans = [Planned(name).plan().counts for name in names]
        counts = " · ".join(f"{plan.rollout_forwards}, {plan.train_passes}" for plan in plans)
        peaks = dict.fromkeys(f"{peak_gib(memory, Planned(name))} GiB" for name in names)
        cells = (", ".join(f"`{name}`" for name in names), "" if model == above else model, text.format(**facts))
        lines.append((*cells, counts, " · ".join(peaks)))
        above = model
    heads = ("`recipes/`", "model", "as published unless said", "forwards, train passes per prompt", "predicted peak")
    return table(heads, lines)


@block("docs/algorithms.md", origin="recipes/shapes_branch_mix_flash.yaml")
def forest() -> str:
    return _indented("\n".join(forest_lines(Planned("shapes_branch_mix_flash").plan())))


@block("docs/many_gpus.md", MEMORY, origin=f"recipes/mix_flux.yaml and profiling/figures/{MEMORY}")
def divided_flux(memory: Rows) -> str:
    """The command, and what it prints behind the plan."""
    recipe, out = DIVIDED_FLUX.load(), io.StringIO()
    console = partial(Console, file=out, width=120, highlight=False, color_system=None)
    settings = [f"--set {setting}" for setting in DIVIDED_FLUX.settings]
    command = (
        f"flowgrove plan recipes/{DIVIDED_FLUX.recipe}.yaml --ranks {DIVIDED_FLUX.ranks} --memory {settings[0]} \\\n"
        f"    {' '.join(settings[1:])}\n"
    )
    division = DIVIDED_FLUX.division(recipe)
    draw_ranks(DIVIDED_FLUX.plan(), recipe, division, console())
    draw_memory(predictions_in(memory, DIVIDED_FLUX), "cuda", division, console())
    return _indented(command + out.getvalue().rstrip())


def _indented(text: str) -> str:
    return "\n" + "\n".join(f"    {line}".rstrip() for line in text.splitlines()) + "\n"


@numbers("README.md", MEMORY)
def readme(memory: Rows) -> Iterator[tuple[str, ...]]:
    yield "(predicted peak: {} GiB,", peak_gib(memory, Planned("branch_mix_flash_flux"))


@numbers("docs/models.md", MEMORY)
def models(memory: Rows) -> Iterator[tuple[str, ...]]:
    yield "All weights of FLUX (`lora: null`) need {} GiB", peak_gib(memory, WHOLE_FLUX)


@numbers("docs/many_gpus.md", MEMORY)
def one_gpu(memory: Rows) -> Iterator[tuple[str, ...]]:
    yield "One GPU alone would need {} GiB.", peak_gib(memory, WHOLE_FLUX)


@numbers("docs/performance.md", MEMORY)
def kept_graph(memory: Rows) -> Iterator[tuple[str, ...]]:
    graph = predictions_in(memory, Planned("mix_flux"))[0].memory.graph
    yield "FLUX at 720² keeps {} GiB a state", f"{graph / 2**30:.1f}"


@numbers("recipes/flux.yaml", MEMORY)
def flux(memory: Rows) -> Iterator[tuple[str, ...]]:
    peaks = [int(peak_gib(memory, Planned(name))) for name in shipped() if name.endswith("_flux") and _extends(name)]
    yield f"{_PEAK}: {{}} GiB", f"{max(peaks)}"
    yield "as the papers trained (lora: null): {} GiB", peak_gib(memory, WHOLE_FLUX)


@numbers("recipes/sd35m.yaml", MEMORY)
def sd35m(memory: Rows) -> Iterator[tuple[str, ...]]:
    peaks = [int(peak_gib(memory, Planned(name))) for name in shipped() if name.endswith("_sd35m")]
    yield f"{_PEAK}: {{}} to {{}} GiB", f"{min(peaks)}", f"{max(peaks)}"


def _extends(name: str) -> bool:
    return "extends: " in (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _own_peak(name: str) -> None:
    @numbers(f"recipes/{name}.yaml", MEMORY)
    def peak(memory: Rows) -> Iterator[tuple[str, ...]]:
        yield f"{_PEAK}: {{}} GiB", peak_gib(memory, Planned(name))


for _name in shipped():  # those that say it themselves
    if f"{_PEAK}: " in (ROOT / "recipes" / f"{_name}.yaml").read_text(encoding="utf-8"):
        _own_peak(_name)


@numbers("recipes/mix_ltx.yaml", MEMORY)
def mix_ltx(memory: Rows) -> Iterator[tuple[str, ...]]:
    yield "(flowgrove plan RECIPE --memory): {} GiB", peak_gib(memory, Planned("mix_ltx"))


@block("docs/algorithms.md", TIMINGS)
def shapes_timings(rows: Rows) -> str:
    lines = []
    for row in rows:
        ours, loop = (
            ", ".join(f"{row[f'{prefix}{key}']:,}" for key in ("rollout_forwards", "train_passes"))
            for prefix in ("", "published_")
        )
        gain, seconds, published = row["rows_speedup"], row["seconds"], row["published_seconds"]
        lines.append((f"`{row['recipe']}`", ours, loop, f"{gain:.2f}", f"{seconds:.2f}", f"{published:.2f}"))
    heads = ("", "forwards, passes", "its published loop", "× by rows alone", "seconds", "published loop's")
    return table(heads, lines)


@numbers("docs/algorithms.md", TIMINGS)
def shapes(timings: Rows) -> Iterator[tuple[str, ...]]:
    recipe = Planned("shapes_mix").load()
    yield (
        "{} prompts × {} pictures, {} steps",
        f"{recipe.data.prompts_per_iteration}",
        f"{recipe.rollout.group_size}",
        f"{recipe.rollout.steps}",
    )
    machine = timings[0]["machine"].split(", ")
    yield (
        "rows of iteration {}, seconds on two x86-64 cores (torch {}, the reference backend)",
        f"{timings[0]['iterations']}",
        version(machine[-1].removeprefix("torch ")),
    )
    eight = {row["published_rows_per_pass"] for row in timings if row["recipe"].startswith("shapes_flow")}
    yield "one row a pass, Flow-GRPO's {}:", *map(str, eight)
