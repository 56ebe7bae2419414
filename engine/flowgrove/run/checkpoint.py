"""What a checkpoint holds: the trained weights, the optimiser's state and the averages as tensors, the rest as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrove.errors import UserError
from flowgrove.models.masters import Piece
from flowgrove.models.policy import Policy
from flowgrove.ranks import Ranks
from flowgrove.run.manifest import MANIFEST, DamagedError, read_state, verify
from flowgrove.run.tensor_files import TensorFiles, holds, piece_of, weight_of
from flowgrove.update.optimizers import load_state_tensors, state_tensors
from flowgrove.update.updater import Updater


def held_tensors(policy: Policy, updater: Updater) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint keeps of this rank, by kind (weights, optimizer, ema) and name: whole tensors and pieces, which
    go on changing.
    """
    trainable = policy.weights.trainable()
    tensors = {
        "weights": {name: p.detach() for name, p in trainable.items()},
        "optimizer": state_tensors(updater.optimizer, trainable),
    }
    if updater.ema is not None:
        tensors["ema"] = dict(updater.ema.average)
    return tensors


def load_checkpoint(
    folder: Path, policy: Policy, updater: Updater | None, ranks: Ranks | None = None
) -> tuple[int, dict[str, Any]]:
    """Puts weights in place (with `updater` its state too; without, the averaged weights if there are any); returns the
    completed iterations and the metrics line of the last one. Of several `ranks` the first verifies for all, and each
    reads what it holds itself.

    Raises UserError if it is damaged or does not fit.
    """
    ranks = ranks or Ranks()
    ranks.by_first(lambda: verify(folder))
    return ranks.together(lambda: _load(folder, policy, updater))


def _load(folder: Path, policy: Policy, updater: Updater | None) -> tuple[int, dict[str, Any]]:
    state, pieces = read_state(folder), policy.weights.pieces
    parameters = policy.weights.trainable()
    # without an updater the model is wanted for evaluation, sampling or export: there the averaged weights serve, if
    # there are any
    kind = "ema" if updater is None and holds(folder, "ema") else "weights"
    weights = _fitting(folder, kind, parameters, pieces, "trains")
    if updater is not None:
        if updater.ema is not None and not holds(folder, "ema") and (folder / MANIFEST).is_file():  # which misses none
            raise UserError(f"update.ema_decay: {folder} holds no averaged weights: write null, or begin a new run")
        averages = None if updater.ema is None else _fitting(folder, "ema", parameters, pieces, "averages")
        _load_moments(folder, parameters, pieces, updater)
        if updater.ema is not None and averages is not None:
            updater.ema.load(averages.read(_rows(averages, parameters, pieces)))
    # in parts: every rank would have a whole model in fp32 in host memory
    policy.weights.load(weights.in_parts(parameters, _rows(weights, parameters, pieces)))
    return int(state["completed_iterations"]), state["line"]


def _fitting(
    folder: Path, kind: str, parameters: dict[str, nn.Parameter], pieces: Mapping[str, Piece], does: str
) -> TensorFiles:
    """Tensors of the names and shapes of all weights that this recipe trains, or averages. Raises UserError."""
    files = TensorFiles(folder, kind)
    if files.shapes != {name: pieces[name].shape if name in pieces else p.shape for name, p in parameters.items()}:
        raise UserError(f"{folder} holds other weights than this recipe {does}: resume with the recipe.yaml of its run")
    odd = set(files.dtypes.values()) - {torch.float32, torch.float64}
    if odd:  # master weights are never anything else
        kinds = sorted(str(dtype).removeprefix("torch.") for dtype in odd)
        raise DamagedError(folder, f"weights of {', '.join(kinds)}")
    return files


def _load_moments(
    folder: Path, parameters: dict[str, nn.Parameter], pieces: Mapping[str, Piece], updater: Updater
) -> None:
    files = TensorFiles(folder, "optimizer")
    if any(
        not dtype.is_floating_point or dtype.itemsize < 4
        for key, dtype in files.dtypes.items() if key.endswith(("/step", "/exp_avg", "/exp_avg_sq"))
    ):  # fmt: skip
        raise DamagedError(folder, "the optimizer's state holds numbers of another kind than was written")
    try:
        load_state_tensors(updater.optimizer, parameters, files.read(_rows(files, parameters, pieces)))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} holds no state of this update.optimizer: resume from another checkpoint") from None


def _rows(files: TensorFiles, parameters: dict[str, nn.Parameter], pieces: Mapping[str, Piece]) -> dict[str, slice]:
    """Of the tensors that this rank has a piece of, its rows."""
    rows = {}
    for name, shape in files.shapes.items():
        piece = piece_of(pieces, name, len(shape))
        if piece is not None:
            rows[name] = slice(piece.start, piece.start + len(parameters[weight_of(name)]))
    return rows
