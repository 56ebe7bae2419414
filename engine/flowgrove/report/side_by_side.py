"""Two models' samples of the same prompts and seeds, side by side, as a PNG."""

from pathlib import Path

import numpy as np

from flowgrove.report.figures import literal, pyplot, save_figure
from flowgrove.report.grids import Grid

_MUTED = "#666666"


def draw_side_by_side(left: Grid, right: Grid, names: tuple[str, str], path: Path) -> None:
    """Rows: prompts; a block of samples for each model, with their scores where there are any."""
    rows, columns = left.tiles.shape[:2]
    height, width = left.tiles.shape[2:4]
    tall, scored = height / width, not np.isnan(left.scores).all()
    side = 1.05 if width <= 64 else 2.0
    figure, axes = pyplot.subplots(
        rows, 2 * columns + 1, figsize=(2 * columns * side + 0.4, rows * (side * tall + 0.4) + 0.4), squeeze=False,
        width_ratios=[1] * columns + [0.35] + [1] * columns,
    )  # fmt: skip
    for row in range(rows):
        for column in range(2 * columns + 1):
            cell = axes[row][column]
            cell.axis("off")
            if column == columns:
                continue
            grid, sample = (left, column) if column < columns else (right, column - columns - 1)
            cell.imshow(grid.tiles[row, sample], interpolation="nearest" if width <= 64 else None)
            if scored:
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
    for name, cell in ((names[0], axes[0][0]), (names[1], axes[0][columns + 1])):
        figure.text(cell.get_position().x0, 1 - 0.18 / inches, **literal(name), fontsize=10, weight="bold", va="center")
    save_figure(figure, path)
