"""Two models' samples of the same prompts and seeds, side by side, as a PNG."""

from pathlib import Path

import numpy as np

from flowgrove.report.figures import literal, pyplot, save_figure
from flowgrove.report.grids import Grid

_MUTED = "#666666"


def draw_side_by_side(left: Grid, right: Grid, names: tuple[str, str], path: Path) -> None:
    """Rows: prompts; the prompt's source pictures, if it has some, and a block of samples for each model, with their
    scores where there are any.
    """
    rows, columns = left.tiles.shape[:2]
    sources = 0 if left.sources is None else left.sources.shape[1]
    first = sources + (sources > 0)  # the first sample's column, behind a gap
    height, width = left.tiles.shape[2:4]
    tall, scored = height / width, not np.isnan(left.scores).all()
    side = 1.05 if width <= 64 else 2.0
    widths = [1] * sources + [0.35] * (sources > 0) + [1] * columns + [0.35] + [1] * columns
    figure, axes = pyplot.subplots(
        rows, len(widths), figsize=((sources + 2 * columns) * side + 0.4, rows * (side * tall + 0.4) + 0.4),
        squeeze=False, width_ratios=widths,
    )  # fmt: skip
    for row in range(rows):
        for column, wide in enumerate(widths):
            cell = axes[row][column]
            cell.axis("off")
            if wide < 1:
                continue
            sample = column - first
            if left.sources is not None and column < sources:
                tile = left.sources[row, column]
            else:
                grid, sample = (left, sample) if sample < columns else (right, sample - columns - 1)
                tile = grid.tiles[row, sample]
            cell.imshow(tile, interpolation="nearest" if width <= 64 else None)
            if scored and column >= first:
                cell.set_title(f"{grid.scores[row, sample]:.2f}", fontsize=7, color=_MUTED, pad=2)
    inches = figure.get_figheight()
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.62 / inches, bottom=0.01, wspace=0.06, hspace=0.4 / (side * tall)
    )
    longest = round(figure.get_figwidth() * 13)  # letters that fit at this size
    for row, prompt in enumerate(left.prompts):
        top = axes[row][0].get_position().y1
        text = prompt if len(prompt) <= longest else prompt[: longest - 1] + "…"
        figure.text(0.012, top + (0.17 if scored else 0.05) / inches, **literal(text), fontsize=8, va="bottom")
    titles = [(names[0], axes[0][first]), (names[1], axes[0][first + columns + 1])]
    for name, cell in [("source", axes[0][0]), *titles] if sources else titles:
        figure.text(cell.get_position().x0, 1 - 0.18 / inches, **literal(name), fontsize=10, weight="bold", va="center")
    save_figure(figure, path)
