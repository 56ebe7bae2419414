"""How much of a gradient is signal, from the gradients of groups of prompts. On the host, in float64.

The gradient of an iteration is the mean over P prompts of g_p, each with the same expectation g, which is the signal,
and a noise of its own. Groups of n_m prompts have the sums S_m = Σ_{p in m} g_p, and

    ‖g‖²  ≈  Σ_{m≠m'} ⟨S_m, S_m'⟩ / Σ_{m≠m'} n_m·n_m'          unbiased, as prompts are independent; may be negative
    tr Σ  ≈  (Σ_m ‖S_m‖² − ‖g‖²·Σ_m n_m²) / P                  the noise of one prompt: E‖g_p − g‖²
    snr   =  P·‖g‖² / tr Σ                                     of the iteration's gradient

The noise scale tr Σ/‖g‖² is the number of prompts with which it is 1.

Its standard error is that of a jackknife over groups (Efron and Stein 1981): snr_m without group m, and

    error² = (M − 1)/M · Σ_m (snr_m − mean)²

Two halves of a prompt's leaves, subtrees that share no random choice after the first split, have h_1 + h_2 = g_p. Their
inner product is that of a prompt's own gradient with itself; what is left of ‖g_p‖² is the luck of its leaves.
Source: the gradient noise scale, McCandlish et al. (1812.06162), appendix A.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
# The null error of the signal falls with the number of groups as √(M/(M−1)), so that more of them hardly tell more
MOST_GROUPS = 8


class Estimate(NamedTuple):
    """‖g‖² and its standard error if there is no signal, tr Σ of a prompt, and the standard error of snr by the
    jackknife, whatever the signal; nan: of two groups there is none.
    """

    signal: float
    error: float
    noise: float
    snr_error: float


class Halves(NamedTuple):
    """Of the two halves of the leaves of one prompt: the cosine between their gradients, and the share of the noise
    that comes from the leaves and not from the prompt. None where a norm is not positive.
    """

    cosine: float | None
    leaf_share: float | None


def estimate(sums: Array, prompts: Array) -> Estimate:
    """From gradients [groups, n] that are sums over `prompts` [groups] of them; at least two groups."""
    products = sums @ sums.T
    own, among = np.diag(products), products - np.diag(np.diag(products))
    pairs = _pairs(prompts)
    signal = among.sum() / pairs
    noise = (own.sum() - signal * (prompts**2).sum()) / prompts.sum()
    error = np.sqrt(2 * (among**2).sum()) / pairs
    return Estimate(float(signal), float(error), float(noise), _snr_error(products, prompts))


def student(freedom: int) -> float:
    """The standard errors that a 95 % interval reaches to either side, at so many degrees of freedom."""
    return float(stdtrit(freedom, 0.975))


def jackknife(left: Array) -> float:
    """The standard error of an estimate from its values [n] without each of n parts."""
    return float(np.sqrt((len(left) - 1) / len(left) * np.square(left - left.mean()).sum()))


def _snr_error(products: Array, prompts: Array) -> float:
    """From the inner products [groups, groups] of sums over so many prompts."""
    if len(prompts) < 3:
        return float("nan")
    own = np.diag(products)
    whole = products.sum() - 2 * products.sum(0) + own
    count, squares = prompts.sum() - prompts, (prompts**2).sum() - prompts**2
    signal = (whole - own.sum() + own) / (count**2 - squares)
    noise = (own.sum() - own - signal * squares) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return jackknife(prompts.sum() * signal / noise)


def product(one: Array, other: Array, prompts: Array) -> float:
    """⟨g, g'⟩ of two gradients of the same prompts, as `estimate` has ‖g‖²."""
    products = one @ other.T
    return float((products.sum() - np.trace(products)) / _pairs(prompts))


def halves(first: Array, second: Array, prompts: Array, share: float) -> Halves:
    """From the two halves of such sums, the first of which has `share` of the leaves."""
    whole = estimate(first + second, prompts)
    count, others = prompts.sum(), (prompts * (prompts - 1)).sum()  # pairs of prompts inside a group

    def of_prompt(one: Array, other: Array, expected: float) -> float:
        """⟨h_i, h_j⟩ of one prompt; `expected`: of two prompts."""
        return float(((one * other).sum() - others * expected) / count)

    between = of_prompt(first, second, share * (1 - share) * whole.signal)
    norms = of_prompt(first, first, share**2 * whole.signal) * of_prompt(
        second, second, (1 - share) ** 2 * whole.signal
    )
    own = between / (share * (1 - share))  # E‖E[g_p | prompt]‖²
    return Halves(
        between / norms**0.5 if norms > 0 else None,
        (whole.noise + whole.signal - own) / whole.noise if whole.noise > 0 else None,
    )


def _pairs(prompts: Array) -> float:
    return float(prompts.sum() ** 2 - (prompts**2).sum())
