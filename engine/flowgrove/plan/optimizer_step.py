"""What an optimiser's step goes through per trained weight. No tensors, no model."""

from dataclasses import dataclass

from flowgrove.recipe.schema import Recipe


@dataclass(frozen=True)
class OptimizerStep:
    """`optimizer`: update.optimizer; `master`: the dtype of what trains; `rounded`: whether passes read bf16 copies of
    it; `averaged`: whether an average follows it.
    """

    optimizer: str
    master: str
    rounded: bool
    averaged: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "OptimizerStep":
        """That of a recipe."""
        return cls(
            optimizer=recipe.update.optimizer,
            master="fp64" if recipe.model.dtype == "fp64" else "fp32",
            rounded=recipe.model.dtype == "bf16",
            averaged=recipe.update.ema_decay is not None,
        )

    @property
    def name(self) -> str:
        """Names all of it."""
        more = (", rounded" if self.rounded else "") + (", averaged" if self.averaged else "")
        return f"{self.optimizer}, {self.master}{more}"

    @property
    def bytes_per_weight(self) -> int:
        """Bytes read and written: by clipping, the optimiser, rounding and averaging."""
        master = 8 if self.master == "fp64" else 4
        clipping = 3 * master  # the gradient's norm, then its scaling
        if self.optimizer == "adamw_8bit":
            # of an fp32 weight and two moments of a byte: cloned (12), read with the gradient and written (16), chosen
            # from old and new (18) and written back (12)
            stepping = 58
        else:
            stepping = 7 * master  # gradient, weight and two moments in, three of them out
        rounding = master + 2 if self.rounded else 0
        averaging = 3 * master if self.averaged else 0  # weight and average in, average out
        return clipping + stepping + rounding + averaging
