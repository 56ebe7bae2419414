"""clean_estimate: x̂0 = x − σ·v, with guidance, and its gradient."""

import pytest
import torch

from flowgrove_kernels import clean_estimate
from kernel_backends import AND_EMULATED
from kernel_cases import pad, randn

pytestmark = AND_EMULATED

X, V, SIGMA = randn(3, 5, seed=1), randn(3, 5, seed=2), torch.tensor([0.9, 0.7, 0.3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (63,), (3, 43), (1031,)])
def test_clean_estimate_is_x_minus_sigma_v(shape, dtype):
    x, v, u = randn(3, *shape, seed=1), randn(3, *shape, seed=2).to(dtype), randn(3, *shape, seed=3).to(dtype)
    estimate = clean_estimate(x, v, SIGMA)
    assert estimate.dtype == torch.float32
    assert estimate.shape == x.shape
    torch.testing.assert_close(estimate.double(), x - pad(SIGMA, x.double()) * v.double(), rtol=0, atol=1e-6)
    guided = clean_estimate(x, v, 0.7, v_uncond=u, guidance_scale=3.0)
    torch.testing.assert_close(
        guided.double(), x - 0.7 * (u.double() + 3 * (v.double() - u.double())), rtol=0, atol=5e-6
    )
    for p in range(3):
        assert torch.equal(clean_estimate(x[p : p + 1], v[p : p + 1], SIGMA[p : p + 1])[0], estimate[p])
    wide = torch.stack([v, u], dim=-1)[..., 0]
    assert torch.equal(clean_estimate(x, wide, SIGMA), estimate)


def test_clean_estimate_gradcheck_and_empty_batch():
    x, v, u = (randn(3, 5, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(
        lambda x, v, u: clean_estimate(x, v, SIGMA.double(), v_uncond=u, guidance_scale=2.5), (x, v, u)
    )
    assert torch.autograd.gradcheck(lambda x, v: clean_estimate(x, v, 0.4), (x, v))
    assert clean_estimate(torch.zeros(0, 4, 3), torch.zeros(0, 4, 3), torch.zeros(0)).shape == (0, 4, 3)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": torch.zeros(3)}),
        ("v", {"v": V[:2]}),
        ("sigma", {"sigma": SIGMA[:2]}),
        ("sigma", {"sigma": SIGMA.to("meta")}),
        ("v_uncond", {"guidance_scale": 2.0}),
    ],
)
def test_clean_estimate_names_wrong_arguments(argument, changes):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        clean_estimate(**{"x": X, "v": V, "sigma": SIGMA} | changes)
