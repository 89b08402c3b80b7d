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
def draws(first_call, seed_ptr, CALLS: tl.constexpr):
    """uint32 [CALLS, 8] in [0, 2^16): draws of 8 * CALLS elements from 8 * first_call on; seed int64 []."""
    counter = first_call.to(tl.int64) + tl.arange(0, CALLS)
    seed = tl.load(seed_ptr)
    w0, w1, w2, w3 = philox(
        (counter & 0xFFFFFFFF).to(tl.uint32),
        ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [CALLS, 4])
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [CALLS, 8])


@triton.jit
def noise_mask(first_call, seed_ptr, threshold, CALLS: tl.constexpr):
    """Bool [CALLS, 8]: which of the 8 * CALLS elements (or blocks) from 8 * first_call on are noised.

    first_call: a multiple of CALLS, a power of two, so that one high counter word serves all; seed int64 [];
    threshold int32 in [0, 65536]. Draws are the 16-bit halves of the words, low half first.
    """
    first_call = first_call.to(tl.int64)
    seed = tl.load(seed_ptr)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = (first_call & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, CALLS).to(tl.uint32)
    c1 = tl.zeros_like(c0) + ((first_call >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, k0, k1)
    # [CALLS, 2, 2] in the order w0, w1, w2, w3
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [CALLS, 4])
    threshold = threshold.to(tl.uint32)
    low = (words & 0xFFFF) < threshold
    high = (words >> 16) < threshold
    return tl.reshape(tl.join(low, high), [CALLS, 8])
