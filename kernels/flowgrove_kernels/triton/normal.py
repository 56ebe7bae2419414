"""Standard normals drawn in registers: Philox4x32-10 and Box–Muller, as `flowgrove_kernels.noise` defines them.

tl.log, tl.cos and tl.sin become approximate instructions on a GPU, so the three are polynomials here, about
one unit in the last place each. Their coefficients are weighted minimax fits of the relative error, each
rounded to fp32 before the next was fitted.
"""

import triton.language as tl

from flowgrove_kernels.triton.element import inner, require


@inner
def natural_log(u):
    """ln u for normal fp32 u > 0: u = m·2ᵉ with m in [2/3, 4/3), then e·ln 2 + ln m; f = m − 1 is exact."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # 0x3F2AAAAB: 2/3
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    series = tl.fma(f, -0.128802090883255, 0.13984593749046326)
    series = tl.fma(series, f, -0.12187447398900986)
    series = tl.fma(series, f, 0.14005734026432037)
    series = tl.fma(series, f, -0.16680197417736053)
    series = tl.fma(series, f, 0.2001042664051056)
    series = tl.fma(series, f, -0.2499980628490448)
    series = tl.fma(series, f, 0.3333321511745453)  # (ln(1 + f) − f + f²/2)/f³ within 5e-9
    series = tl.fma(f * f, tl.fma(series, f, -0.5), f)
    return tl.fma(exponent.to(tl.float32), 0.6931471805599453, series)


@inner
def cosine_sine(angle):
    """(cos, sin) of fp32 angles in [0, 2π]: the nearest multiple of π/2 is taken off in two parts, the
    first of 21 bits so that it goes off exactly.
    """
    magic = tl.fma(angle, 0.6366197723675814, 12582912.0)  # 1.5·2²³: the last bits of the sum are the multiple
    quarter = magic.to(tl.int32, bitcast=True)
    turns = magic - 12582912.0
    r = tl.fma(turns, -3.13916478589249e-07, tl.fma(turns, -1.570796012878418, angle))
    square = r * r
    sine = tl.fma(tl.fma(square, -0.0001951828453456983, 0.008332189172506332), square, -0.16666655242443085)
    sine = tl.fma(r * square, sine, r)
    cosine = tl.fma(tl.fma(square, 2.4432327336398885e-05, -0.0013887309469282627), square, 0.04166664555668831)
    cosine = tl.fma(square, tl.fma(square, cosine, -0.5), 1.0)
    odd = (quarter & 1) != 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


@inner
def uniform(word):
    """((word >> 9) + ½)·2⁻²³, exactly: the bits of a number in [1, 2), less 1 − 2⁻²⁴."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375


@inner
def block_normals(seed, node, step, prompt, i_block, BLOCK: tl.constexpr):
    """[BLOCK] normals of block i_block of a row: each counter gives four neighbours, which stay in one thread.
    seed: 64 bits, iteration in the high half.
    """
    o_counter = i_block.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, o_counter, node, step, prompt)
    radius = tl.sqrt_rn(-2.0 * natural_log(uniform(tl.join(w0, w2))))  # [BLOCK/4, 2]
    c, s = cosine_sine(6.283185482025146484375 * uniform(tl.join(w1, w3)))  # fl32(2π)
    return tl.reshape(tl.join(radius * c, radius * s), (BLOCK,))


@inner
def key_words(p_key, s_word, s_key, i_edge):
    """Column i_edge of a packed key, int64: seed, iteration, step, prompt, node, parent."""
    p_words = p_key + i_edge * s_key
    seed, iteration, step = tl.load(p_words), tl.load(p_words + s_word), tl.load(p_words + 2 * s_word)
    prompt, node, parent = tl.load(p_words + 3 * s_word), tl.load(p_words + 4 * s_word), tl.load(p_words + 5 * s_word)
    return seed, iteration, step, prompt, node, parent


@inner
def require_words(seed, iteration, step, prompt, node, parent, i_block, CORRELATED: tl.constexpr, BLOCK: tl.constexpr):
    """`noise.require_words` of one column, by the first program of its row."""
    if (i_block == 0) & (((seed | iteration | step | prompt | node | parent) >> 32) != 0):
        require((seed >> 32) == 0, "NoiseKey.seed holds a value outside [0, 2**32)", BLOCK)
        require((iteration >> 32) == 0, "NoiseKey.iteration holds a value outside [0, 2**32)", BLOCK)
        require((step >> 32) == 0, "NoiseKey.step holds a value outside [0, 2**32)", BLOCK)
        require((prompt >> 32) == 0, "NoiseKey.prompt holds a value outside [0, 2**32)", BLOCK)
        require((node >> 32) == 0, "NoiseKey.node holds a value outside [0, 2**32)", BLOCK)
        require((parent >> 32) == 0, "NoiseKey.parent holds a value outside [0, 2**32)", BLOCK)
    if CORRELATED:  # below SHARED_STEP - 1
        require(
            (step < 0x7FFFFFFF) | (i_block > 0), "NoiseKey.step must be below 2**31 - 1 for correlated siblings", BLOCK
        )


@inner
def edge_normals(
    p_key,
    s_word,
    s_key,
    i_edge,
    i_block,
    shared,
    own,
    CORRELATED: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK] of the noise that column i_edge of a packed key names; correlated: shared·ξ_parent +
    own·ξ, with shared = √ρ and own = √(1−ρ).

    CHECKED: an earlier kernel has called `require_words`.
    """
    seed, iteration, step, prompt, node, parent = key_words(p_key, s_word, s_key, i_edge)
    if not CHECKED:
        require_words(seed, iteration, step, prompt, node, parent, i_block, CORRELATED, BLOCK)
    seed = seed | (iteration << 32)
    step, prompt, node = step.to(tl.uint32), prompt.to(tl.uint32), node.to(tl.uint32)
    b_z = block_normals(seed, node, step, prompt, i_block, BLOCK)
    if CORRELATED:
        b_shared = block_normals(seed, parent.to(tl.uint32), step + 0x80000000, prompt, i_block, BLOCK)  # SHARED_STEP
        b_z = tl.fma(tl.full((), shared, tl.float32), b_shared, tl.full((), own, tl.float32) * b_z)
    return b_z
