"""Philox4x32-10 and the noise mask, as defined in reference/philox.py."""

import triton
import triton.language as tl

from .numeric import SOFT


@triton.jit
def _halves(a, FACTOR: tl.constexpr):
    """High and low 32 bits of a * FACTOR, from one instruction: LLVM would make it several."""
    if SOFT:
        product = a.to(tl.uint64) * FACTOR
        high, low = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        high, low = tl.inline_asm_elementwise(
            "{ .reg .u64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [a, tl.full([], FACTOR, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    return high, low


@triton.jit
def philox(c0, c1, k0, k1):
    """Four uint32 words for counters (c0, c1, 0, 0), uint32 [n], under the key (k0, k1)."""
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0, low0 = _halves(c0, 0xD2511F53)
        high1, low1 = _halves(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(c0, c1, seed_ptr):
    """uint32 [n, 4]: the words of calls c0 + 2^32 c1, uint32 [n], in turn; seed int64 []."""
    seed = tl.load(seed_ptr)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, k0, k1)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [c0.shape[0], 4])


@triton.jit
def draws(first_call, seed_ptr, CALLS: tl.constexpr):
    """uint32 [CALLS, 8] in [0, 2^16): draws of 8 * CALLS elements from 8 * first_call on; seed int64 []."""
    call = first_call.to(tl.int64) + tl.arange(0, CALLS)
    words = _words((call & 0xFFFFFFFF).to(tl.uint32), ((call >> 32) & 0xFFFFFFFF).to(tl.uint32), seed_ptr)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [CALLS, 8])


@triton.jit
def noise_mask(first, seed_ptr, threshold, N: tl.constexpr, BITS: tl.constexpr):
    """Bool [N / 8, 8]: which of the N elements (or blocks) from `first` on are noised.

    first: a multiple of N, a power of two from 8 on; seed int64 []; threshold int32 in [0, 65536]. BITS: of a
    draw, 16, or 1 where the threshold is 32768.
    """
    CALLS: tl.constexpr = max(N * BITS // 128, 1)
    call = first.to(tl.int64) // (128 // BITS)
    # a multiple of CALLS, which is a power of two: one high counter word serves all
    c0 = (call & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, CALLS).to(tl.uint32)
    c1 = tl.zeros_like(c0) + ((call >> 32) & 0xFFFFFFFF).to(tl.uint32)
    words = _words(c0, c1, seed_ptr)
    if BITS == 1:
        eights = tl.reshape(words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :], [16 * CALLS])
        if N < 128:
            eights = tl.gather(eights, (first // 8 % 16).to(tl.int32) + tl.arange(0, N // 8), axis=0)
        noised = ((eights[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 0
    else:
        threshold = threshold.to(tl.uint32)
        low = (words & 0xFFFF) < threshold
        high = (words >> 16) < threshold
        noised = tl.reshape(tl.join(low, high), [N // 8, 8])
    return noised
