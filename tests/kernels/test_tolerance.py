"""How close a GPU has to come to the reference (op_calls.assert_close), tried on the C++ ops:
right results pass, wrong ones do not.
"""

import pytest
import torch

from flowgrove_kernels import available_backends, use_backend
from op_calls import GPU_SIZES, assert_close, batch_of, every_op

BATCHES = [(elements, 2) for elements in GPU_SIZES] + [(elements, 3) for elements in (3, 8, 129, 1032, 20_003, 66_000)]


@pytest.mark.skipif("cpu" not in available_backends(), reason="the compiled ops are not here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("elements", "fanout"), BATCHES)
def test_right_results_are_close(elements, fanout, dtype):
    batch = batch_of(3, elements, fanout=fanout, dtype=dtype)
    with use_backend("cpu"):
        found = every_op(batch)
    with use_backend("reference"):
        assert_close(found, every_op(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_results_are_not(dtype):
    units = 2 if dtype != torch.float32 else 1000
    right = torch.linspace(0.5, 1, 100, dtype=dtype)
    wrong = {
        "all": right + units * torch.finfo(dtype).eps,
        "one": torch.where(torch.arange(100) == 50, right * (1 + units * torch.finfo(dtype).eps), right),
        "lost": torch.where(torch.arange(100) == 50, torch.nan, right),
        "type": right.double(),
    }
    assert_close({"right": right}, {"right": right})
    for name, values in wrong.items():
        with pytest.raises(AssertionError, match=name):
            assert_close({name: values}, {name: right})
