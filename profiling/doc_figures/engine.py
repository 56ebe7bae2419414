"""What the engine benchmark found: an iteration of the published loops, and of Flowgrove."""

from collections.abc import Iterator

from doc_figures.registry import Row, Rows, block, numbers, only, table, version

TINY, SD3, FLUX = "engine_tiny_cpu.csv", "engine_sd3_mid_cpu.csv", "engine_flux_slim_nvidia_h200.csv"
QWEN = "engine_qwen_mid_cpu.csv"
_LOOP, _FUSED, _FULL, _SHARED, _REUSED, _SPLIT = (
    "published loop", "+ fused ops", "+ full batches", "+ shared states", "+ reused graphs", "+ split lengths",
)  # fmt: skip
_NAMES = {
    "dance": "DanceGRPO, the published loop",
    "mix": "MixGRPO",
    "branch_mix": "BranchGRPO-Mix",
    "branch_mix_flash": "BranchGRPO-Mix with Flash's tail: ours",
    "grove": "a tree that splits in its first two steps, with Flash's tail: ours",
}


def _pairs(rows: Rows) -> dict[str, tuple[Row, Row]]:
    """(published loop, last lever in full precision) by recipe, in the order of the docs; the same row twice where only
    one ran.
    """
    order = ("dance", "flow", "flow_fast", "mix", "mix_flash", "branch", "branch_mix", "branch_mix_flash", "grove")
    found = {}
    for name in order:
        of_recipe = [row for row in rows if row["recipe"] == name and not row["lever"].endswith(" rollouts")]
        if of_recipe:
            found[name] = of_recipe[0], of_recipe[-1]
    return found


def _counts(row: Row) -> str:
    return ", ".join(f"{row[key] / row['prompts']:,.0f}" for key in ("rollout_forwards", "train_passes"))


def _times(value: float, digits: int = 1) -> str:
    return "1" if value == 1 else f"{value:.{digits}f}"


@block("README.md", FLUX)
def cost_of_an_iteration(rows: Rows) -> str:
    heads = ("recipe", "rows through the transformer: rollout, training", "× by rows alone", "seconds", "× in time")
    lines = []
    for name, (_, ours) in _pairs(rows).items():
        fewer = _times(ours["rows_over_dance"])
        seconds = f"{ours['seconds']:.1f}"
        bold = fewer if ours["lever"] == _LOOP else f"**{fewer}**"
        lines.append((_NAMES[name], _counts(ours), bold, seconds, _times(ours["over_dance"])))
    return table(heads, lines)


@numbers("README.md", FLUX)
def readme(rows: Rows) -> Iterator[tuple[str, ...]]:
    first = rows[0]
    compiler = first["compiler"].removeprefix("CUDA ")
    yield "on one NVIDIA H200 (torch {}, CUDA {})", version(first["torch"]), compiler
    ours = [row["rows_speedup"] for row in rows if row["lever"] == _REUSED]
    yield "over its own algorithm's published loop each is {} to {} by rows", *_range(ours, 1)


def _range(values: list[float], digits: int) -> tuple[str, str]:
    return f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"


@block("docs/performance.md", TINY)
def rows_per_prompt(rows: Rows) -> str:
    heads = ("", "published rows", "Flowgrove's", "× of its own published loop", "× of DanceGRPO's")
    return table(
        heads,
        (
            (f"`{name}`", _counts(loop), _counts(ours), f"{ours['rows_speedup']:.2f}", f"{ours['rows_over_dance']:.1f}")
            for name, (loop, ours) in _pairs(rows).items()
        ),
    )


@block("docs/performance.md", FLUX)
def slim_flux(rows: Rows) -> str:
    lines = []
    for name, (loop, ours) in _pairs(rows).items():
        over = [_times(ours["over_dance"]), _times(ours["rows_over_dance"])]
        own = ["", "", ""]
        if ours is not loop:
            seconds, gain = f"{ours['seconds']:.1f}", f"{ours['speedup']:.2f}"
            own = [seconds, gain, f"{ours['rows_speedup']:.2f}"]
        lines.append((f"`{name}`", f"{loop['seconds']:.1f}", *own, *over))
    heads = (
        "", "published loop, s", "Flowgrove, s", "×", "of that by rows", "× of DanceGRPO's loop", "of that by rows",
    )  # fmt: skip
    return table(heads, lines)


@numbers("docs/performance.md", FLUX)
def fp8_rollouts(rows: Rows) -> Iterator[tuple[str, ...]]:
    before = {row["recipe"]: row["seconds"] for row in rows if row["lever"] == _REUSED}
    after = {row["recipe"]: row["seconds"] for row in rows if row["lever"] == "+ fp8 rollouts"}
    yield (
        "`rollout.precision: fp8` takes another {} to {} %",
        *_range([100 * (1 - after[n] / before[n]) for n in after], 0),
    )


@block("docs/performance.md", TINY)
def tiny_levers(rows: Rows) -> str:
    heads = (
        "", _LOOP, _FUSED, _FULL, _SHARED, _REUSED, "×", "of that by rows",
    )  # fmt: skip
    lines = []
    for name, (_, ours) in _pairs(rows).items():
        levers = (only(rows, recipe=name, lever=lever) for lever in (_LOOP, _FUSED, _FULL, _SHARED))
        seconds = (f"{row['seconds']:.2f}" for row in levers)
        gains = f"{ours['speedup']:.1f}", f"{ours['rows_speedup']:.2f}"
        lines.append((f"`{name}`", *seconds, f"**{ours['seconds']:.2f}**", *gains))
    return table(heads, lines)


@block("docs/performance.md", SD3)
def sd3_mid(rows: Rows) -> str:
    heads = (
        "", "published loop", "Flowgrove", "×", "of that by rows", "× of DanceGRPO's loop", "of that by rows",
    )  # fmt: skip
    return table(
        heads,
        (
            (
                f"`{name}`",
                f"{loop['seconds']:.2f}",
                f"{ours['seconds']:.2f}",
                f"{ours['speedup']:.1f}",
                f"{ours['rows_speedup']:.2f}",
                f"{ours['over_dance']:.1f}",
                f"{ours['rows_over_dance']:.1f}",
            )
            for name, (loop, ours) in _pairs(rows).items()
        ),
    )


@block("docs/performance.md", QWEN)
def masked_texts(rows: Rows) -> str:
    heads = ("", *(row["lever"] for row in rows))
    return table(heads, [("`branch_mix_flash`", *(f"{row['seconds']:.1f}" for row in rows))])


@numbers("docs/performance.md", QWEN)
def masked(rows: Rows) -> Iterator[tuple[str, ...]]:
    gain = only(rows, lever=_REUSED)["seconds"] / only(rows, lever=_SPLIT)["seconds"]
    yield "a small model on two CPU cores: × {} |", f"{gain:.2f}"
    yield "{} prompts of three lengths, medians of {} rounds", *(f"{rows[0][key]}" for key in ("prompts", "rounds"))


@numbers("docs/performance.md", TINY, SD3, FLUX)
def performance(tiny: Rows, sd3: Rows, flux: Rows) -> Iterator[tuple[str, ...]]:
    last_tiny, last_sd3, last_flux = ([ours for _, ours in _pairs(rows).values()] for rows in (tiny, sd3, flux))
    same = [row["rows_speedup"] for row in last_tiny]
    yield "× {} to {} by rows over the same algorithm's published loop", *_range(same, 1)
    windows = [
        row["rows_over_dance"]
        for row in (*last_tiny, *last_sd3, *last_flux)
        if row["recipe"] not in ("dance", "flow", "branch")
    ]
    yield "× {} to {} by rows over DanceGRPO with all steps trained", *_range(windows, 1)
    retained = _gains(tiny, _SHARED, _REUSED)
    yield (
        "a forward of each of that update's rows; a million weights on two CPU cores: × {} to {} |",
        f"{min(retained):.1f}", f"{max(retained):.2f}",
    )  # fmt: skip
    yield "a million weights on two CPU cores: × {} to {} |\n| replays", *_range(_gains(tiny, _FUSED, _FULL), 0)
    yield "a million weights on two CPU cores: × {} to {}; larger", *_range(_gains(tiny, _LOOP, _FUSED), 2)
    pages = {loop["recipe"]: loop["rows_per_pass"] for loop, _ in _pairs(tiny).values()}
    if {rows for name, rows in pages.items() if not name.startswith("flow")} != {1}:
        raise ValueError("the sentence on the rows a pass of the published loops says one")
    yield "DanceGRPO, MixGRPO and BranchGRPO run one row a pass, Flow-GRPO {};", f"{pages['flow']}"
    first = flux[0]
    versions = version(first["torch"]), version(first["triton"]), first["compiler"].removeprefix("CUDA ")
    yield "H200 (torch {}, Triton {}, CUDA {}), one round.", *versions
    yield "Flowgrove with its defaults, {} rows a pass", f"{only(flux, recipe='mix', lever=_REUSED)['rows_per_pass']}"
    rewards = {f"{row['reward_s']:.1f}" for row in flux}
    yield "Decoding and rewards are {} s of each", *rewards
    yield "Two x86-64 cores, torch {}, seconds of an iteration.", version(tiny[0]["torch"])
    how = (f"{tiny[0][key]}" for key in ("prompts", "rounds"))
    yield "a million weights, {} prompts, medians of {} interleaved rounds", *how
    outside = [_range([row["percent_outside"] for row in rows], 0) for rows in (last_tiny, last_sd3)]
    yield (
        "stay {} to {} % of an iteration of the tiny model, most of it the VAE, and {} to {} % of the larger one's",
        *outside[0], *outside[1],
    )  # fmt: skip


def _gains(rows: Rows, before: str, after: str) -> list[float]:
    """Of every recipe the seconds with the lever `before` over those with `after`."""
    return [
        only(rows, recipe=name, lever=before)["seconds"] / only(rows, recipe=name, lever=after)["seconds"]
        for name in _pairs(rows)
    ]
