"""Which trackers there are, and which are installed."""

from importlib.util import find_spec

from flowgrove.errors import UserError

# the name in run.log, which is that of the package and of the module here → what people call it, its class
TRACKERS = {
    "tensorboard": ("TensorBoard", "TensorBoard"),
    "wandb": ("Weights & Biases", "WeightsAndBiases"),
    "swanlab": ("SwanLab", "SwanLab"),
    "trackio": ("Trackio", "Trackio"),
    "mlflow": ("MLflow", "MLflow"),
}


def is_installed(name: str) -> bool:
    """Whether its package can be imported. A folder of that name in the working folder, which some of them leave
    behind, is none.
    """
    found = find_spec(name)
    return found is not None and found.origin is not None


def check_installed(log: list[str]) -> None:
    """Raises UserError for a tracker in run.log that is not installed."""
    for name in log:
        if name in TRACKERS and not is_installed(name):
            raise UserError(
                f"run.log asks for {name}, which is not installed: pip install {name}, or take {name} out of run.log"
            )


def installed_line() -> str:
    """What run.log may name here, and what it lacks."""
    usable = [name for name in TRACKERS if is_installed(name)]
    lacking = [name for name in TRACKERS if name not in usable]
    return f"usable in run.log: {', '.join(usable) or 'none'}" + (
        f"; pip install for: {', '.join(lacking)}" if lacking else ""
    )
