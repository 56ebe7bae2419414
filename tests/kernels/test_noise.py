"""MATH §2: noise is a function of (seed, iteration, step, prompt, node, element) and of nothing else."""

import copy
import math
import pickle
from dataclasses import replace

import numpy
import pytest
import torch

from flowgrove_kernels import INITIAL_STEP, NoiseKey, flow_step, philox_normal
from flowgrove_kernels.noise import philox_words
from kernel_backends import AND_EMULATED
from kernel_cases import ODD_SIZES, box_muller, normal_reference, philox_reference, row

pytestmark = AND_EMULATED
WORD = 2**32 - 1
FIELDS = ("seed", "iteration", "step", "prompt", "node")
VECTORS = (  # Random123's known answers for philox4x32-10: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
ROWS = [
    (0, 0, 0, 0, 0),
    (1, 2, 3, 4, 5),
    (WORD, 7, 2**31 - 2, WORD, 11),
    (42, WORD, INITIAL_STEP, 0, WORD),
    (123456789, 9, 19, 250_000, 16_383),
]


def key_of(rows):
    return NoiseKey(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def tree_key(parents, fanout, **words):
    """Children K·parent + c of nodes 0 … parents − 1."""
    node = torch.arange(parents * fanout)
    return NoiseKey(**{"seed": 5, "iteration": 6, "step": 7, "prompt": 8} | words, node=node, parent=node // fanout)


def noise_of_step(key, parents, fanout, elements, correlation):
    """z itself: x' of a step with μ = 0 and s = 1."""
    zeros = torch.zeros(parents, elements)
    return flow_step(
        zeros, zeros, row(0, 0, 0, 1, 0.5, 0)[[0] * parents], key=key, fanout=fanout, sibling_correlation=correlation
    )[0]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_words_are_those_of_random123(counter, key, words):
    ours = philox_words(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(word.item() for word in ours) == words
    # the reference of the tests below is itself checked
    assert tuple(int(word) for word in philox_reference(counter, key)) == words


def test_first_normals_of_the_zero_key_come_from_the_known_answer():
    expected = box_muller(VECTORS[0][2])
    z = philox_normal((1, 4), NoiseKey(0, 0, 0, 0, 0))[0].double().numpy()
    assert (abs(z - expected) <= 1e-6 * numpy.maximum(1, abs(expected))).all()


@pytest.mark.parametrize("elements", ODD_SIZES)
def test_normals_are_box_muller_of_philox(elements):
    z = philox_normal((len(ROWS), elements), key_of(ROWS))
    assert z.dtype == torch.float32
    assert z.shape == (len(ROWS), elements)
    expected = normal_reference(ROWS, elements)
    assert (abs(z.double().numpy() - expected) <= 1e-6 * numpy.maximum(1, abs(expected))).all()
    assert abs(z.double().numpy() - normal_reference(ROWS, elements, round_angle=False)).max() <= 3e-6


@pytest.mark.parametrize("elements", [*ODD_SIZES, 4096])
def test_noise_is_independent_of_batch_order_and_key_form(elements):
    together = philox_normal((len(ROWS), elements), key_of(ROWS))
    for i, words in enumerate(ROWS):
        assert torch.equal(philox_normal((1, elements), NoiseKey(*words))[0], together[i])
    order = [3, 0, 4, 4, 1]
    assert torch.equal(philox_normal((5, elements), key_of([ROWS[i] for i in order])), together[order])


def test_ints_stand_for_every_row():
    node = torch.arange(6)
    spelled_out = NoiseKey(*(torch.full((6,), word) for word in (3, 4, 5, 6)), node)
    assert torch.equal(philox_normal((6, 63), NoiseKey(3, 4, 5, 6, node)), philox_normal((6, 63), spelled_out))


def test_elements_follow_the_contiguous_sample():
    key = key_of(ROWS)
    long = philox_normal((len(ROWS), 1031), key)
    for elements in (1, 2, 3, 4, 5, 63, 1030):
        assert torch.equal(philox_normal((len(ROWS), elements), key), long[:, :elements])
    assert torch.equal(philox_normal((len(ROWS), 3, 7, 5), key), long[:, :105].reshape(-1, 3, 7, 5))


@pytest.mark.parametrize("field", FIELDS)
def test_every_word_of_the_key_gives_another_stream(field):
    words = dict(zip(FIELDS, (1, 2, 3, 4, 5), strict=True))
    size = 20_000
    streams = torch.cat(
        [philox_normal((1, size), NoiseKey(**words | {field: words[field] + i})) for i in range(4)]
    ).double()
    correlation = torch.corrcoef(streams) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(size)


def test_samples_have_the_moments_and_the_distribution_of_a_standard_normal():
    z = philox_normal((16, 16_381), NoiseKey(7, 0, 1, 2, torch.arange(16))).double().flatten()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # Var z^p = E z^2p − (E z^p)²
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(variance / n)
    empirical = (torch.arange(n) + 0.5) / n
    distance = (torch.special.ndtr(z.sort().values) - empirical).abs().max().item() + 0.5 / n
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov: exceeded once in a thousand streams
    assert 4 < z.abs().max() < math.sqrt(2 * 24 * math.log(2))  # u ≥ 2⁻²⁴


def test_neighbouring_elements_are_uncorrelated():
    z = philox_normal((1, 100_000), NoiseKey(1, 1, 1, 1, 1))[0].double()
    for lag in (1, 2, 3, 4, 5):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 4.5 / math.sqrt(len(z))


@pytest.mark.parametrize("elements", ODD_SIZES)
def test_siblings_share_the_component_their_parent_names(elements, backend):
    parents, fanout, rho = 3, 2, 1 / 17
    own = normal_reference([(5, 6, 7, 8, node) for node in range(6)], elements)
    shared = normal_reference([(5, 6, 7 + 2**31, 8, node // fanout) for node in range(6)], elements)
    expected = math.sqrt(rho) * shared + math.sqrt(1 - rho) * own
    z = noise_of_step(tree_key(parents, fanout), parents, fanout, elements, rho).double().numpy()
    assert (abs(z - expected) <= 2e-6 * numpy.maximum(1, abs(expected))).all()


@pytest.mark.parametrize("rho", [1 / 17, 0.5, 1.0])
def test_sibling_marginals_are_normal_and_only_siblings_correlate(rho, backend):
    parents, fanout, elements = 3, 3, 20_001
    z = noise_of_step(tree_key(parents, fanout), parents, fanout, elements, rho).double()
    bound = 4.5 / math.sqrt(elements)
    assert z.mean(1).abs().max() < bound
    assert (z.var(1) - 1).abs().max() < bound * math.sqrt(2)
    family = torch.arange(9) // fanout
    siblings = family[:, None] == family[None, :]
    products = z @ z.T / elements
    same, apart = products[siblings & ~torch.eye(9, dtype=torch.bool)], products[~siblings]
    assert len(same) == 18
    assert len(apart) == 54
    assert (same - rho).abs().max() < bound * math.sqrt(1 + rho**2)
    assert apart.abs().max() < bound


def test_correlation_zero_is_the_plain_stream(backend):
    assert torch.equal(noise_of_step(tree_key(3, 2), 3, 2, 63, 0.0), philox_normal((6, 63), tree_key(3, 2)))


@pytest.mark.parametrize("value", [-1, 2**32])
@pytest.mark.parametrize("field", [*FIELDS, "parent"])
def test_words_outside_32_bits_are_errors(field, value):
    words = dict.fromkeys((*FIELDS, "parent"), 1)
    assert philox_normal((2, 3), NoiseKey(**words)).shape == (2, 3)
    with pytest.raises(ValueError, match=field):
        philox_normal((2, 3), NoiseKey(**words | {field: value}))
    with pytest.raises((ValueError, RuntimeError), match=field):
        philox_normal((2, 3), NoiseKey(**words | {field: torch.tensor([1, value])}))


@pytest.mark.parametrize("field", [*FIELDS, "parent"])
@pytest.mark.parametrize(
    "value", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.zeros(2)]
)
def test_key_tensors_are_int64_with_one_value_per_row(field, value):
    with pytest.raises(ValueError, match=field):
        philox_normal((2, 3), NoiseKey(**dict.fromkeys((*FIELDS, "parent"), 1) | {field: value}))


@pytest.mark.parametrize("step", [2**31 - 1, 2**31, INITIAL_STEP])
def test_a_shared_component_needs_a_step_below_its_own_words(step, backend):
    """ξ_0 takes step + 2³¹, which must stay a 32-bit word and must not meet x_T's 2³² − 1."""
    assert torch.isfinite(noise_of_step(tree_key(2, 2, step=2**31 - 2), 2, 2, 5, 0.5)).all()
    with pytest.raises(ValueError, match="step"):
        noise_of_step(tree_key(2, 2, step=step), 2, 2, 5, 0.5)


def test_zero_rows_and_zero_elements():
    assert philox_normal((0, 5), NoiseKey(1, 2, 3, 4, 5)).shape == (0, 5)
    assert philox_normal((0, 5), NoiseKey(1, 2, 3, 4, torch.zeros(0, dtype=torch.int64))).shape == (0, 5)
    assert philox_normal((3, 0), NoiseKey(1, 2, 3, 4, 5)).shape == (3, 0)


def test_a_packed_key_is_what_its_words_say():
    """Also after `replace`, and in copies, where the words no longer lie in the packed tensor."""
    key = tree_key(3, 2)
    packed, later = key.packed(6), philox_normal((6, 5), replace(key, step=9))
    assert torch.equal(philox_normal((6, 5), packed), philox_normal((6, 5), key))
    assert torch.equal(philox_normal((6, 5), replace(packed, step=9)), later)
    assert torch.equal(philox_normal((6, 5), replace(packed, step=torch.full((6,), 9))), later)
    for copied in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), packed):
        assert torch.equal(philox_normal((6, 5), copied), philox_normal((6, 5), key))
        copied.step.fill_(9)
        assert torch.equal(philox_normal((6, 5), copied), later)


def test_a_packed_key_is_not_packed_again():
    tensor = tree_key(3, 2).pack(6)
    packed = NoiseKey.of_packed(tensor)
    for known in (packed, replace(packed), packed.packed(6), replace(packed, seed=packed.seed)):
        assert known.pack(6) is tensor


def test_a_key_of_a_packed_tensor_follows_it():
    tensor = tree_key(3, 2).pack(6)
    key, later = NoiseKey.of_packed(tensor), philox_normal((6, 5), replace(tree_key(3, 2), step=9))
    assert torch.equal(philox_normal((6, 5), key), philox_normal((6, 5), tree_key(3, 2)))
    tensor[2] = 9
    assert torch.equal(philox_normal((6, 5), key), later)


@pytest.mark.parametrize("tensor", [torch.zeros(6, 2), torch.zeros(5, 2, dtype=torch.int64), torch.arange(6), None])
def test_a_packed_key_is_int64_of_six_rows(tensor):
    with pytest.raises(ValueError, match=r"the packed key is .*: pass int64 \[6, rows\]"):
        NoiseKey.of_packed(tensor)


def test_keys_are_equal_to_themselves_alone():
    key = tree_key(3, 2)
    assert key == key  # noqa: PLR0124
    assert key != tree_key(3, 2)
