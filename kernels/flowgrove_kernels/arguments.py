"""What the functions are called with: numbers and tensors. Each check names the argument and says what to pass instead.

Nothing here reads a value from a device.
"""

import sys
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

LARGEST = sys.float_info.max
_INTEGERS: tuple[type[Any], ...] = (int, torch.SymInt, Integral)
_PLAIN: tuple[type[Any], ...] = (int, float, torch.SymInt, torch.SymFloat)
_NUMBERS: tuple[type[Any], ...] = (*_PLAIN, Real)


def wrong(name: str, value: Any, wanted: str, *, place: bool = False) -> NoReturn:
    """Raises the ValueError that every check ends in; `place`: the device of a tensor is part of what is wrong.

    `wanted` may hold sizes only because this ends the call: a size in a text is a constant to torch.compile.
    """
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" ({str(value.layout).removeprefix('torch.')})"
        found = f"{value.dtype} {list(value.shape)}{layout}{f' on {value.device}' if place else ''}"
    else:
        items = value if isinstance(value, tuple | list) else (value,)
        plain = all(item is None or isinstance(item, Real | str) for item in items)
        found = repr(value) if plain else f"a {type(value).__name__}"
    raise ValueError(f"{name} is {found}: {wanted}")


def is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> TypeGuard[float]:
    """Whether a number of Python or NumPy, no bool, lies in [low, high]; NaN lies nowhere."""
    if not isinstance(value, _NUMBERS) or isinstance(value, bool):
        return False
    return low <= (value if isinstance(value, _PLAIN) else float(value)) <= high  # fp32 has no room for LARGEST


def number(value: Any, name: str, wanted: str, low: float = -LARGEST, high: float = LARGEST) -> float:
    """`value` as a float. Raises ValueError for what is no number in [low, high]."""
    if not is_number(value, low, high):
        wrong(name, value, wanted)
    return float(value)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy, no bool."""
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def check_fanout(fanout: int) -> None:
    """Every state has the same number of children, one at least, and no more than an index of int32 can count."""
    if not is_integer(fanout) or fanout < 1 or fanout >= 2**31:
        wrong("fanout", fanout, "write an integer in [1, 2**31)")


def check_tensor(value: Any, name: str) -> None:
    """A dense tensor without a tangent: the ops differentiate backwards only."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        wrong(name, value, "pass a dense torch tensor")
    check_tangent(value, name)


def check_tangent(value: Tensor, name: str) -> None:
    """A tensor of no forward-mode derivative, which the ops would take for 0."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{name} has a tangent, but no op has a forward derivative: differentiate with .backward()")


def check_constant(value: Tensor, name: str) -> None:
    """A tensor with respect to which nothing is differentiated."""
    check_tangent(value, name)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but no op differentiates it: pass {name}.detach()")
