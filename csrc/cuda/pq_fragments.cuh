// Products of mma.sync m16n8k16 with codewords as an operand, as they come from the table.
//
// The order of k inside a product is free, if both operands have the same. With g = lane / 4 and t = lane % 4 the
// instruction gives a thread the k of {2t, 2t+1, 2t+8, 2t+9}; here they stand for four adjacent elements, so that a
// thread's eight k of two products are one octet: 16 bytes of a codeword, and 16 bytes of a row of x. The order of the
// outputs is free too: thread g has a run of adjacent ones, one or two in each product.
#pragma once

#include "cuda/pq_codewords.cuh"

namespace qnk {

// Codes of Count adjacent outputs for one octet of columns.
template <typename Code, int Width, int Count>
struct OctetCodes {
    CodeRun<Code, Count> run[8 / Width];

    template <bool Whole = false>
    __device__ __forceinline__ void load(const PqWeight& w, const OctetPlace<Width>& place, int first_output) {
#pragma unroll
        for (int h = 0; h < 8 / Width; ++h) run[h].template load<Whole>(w, place.block[h], first_output);
    }
};

// Up to 4 tokens, `x` of a step: with codewords as the operand of 16 rows, row g has the words 0 and 2 of a codeword as
// it was loaded, row g + 8 words 1 and 3 of the same. So column 2t has those words of token t, and column 2t + 1
// these: what counts of a product is (row g, column 2t) and (row g + 8, column 2t + 1), two sums of one thread. This
// takes one product for an octet instead of two, and no register has to be moved. 8 or 16 tokens: the octets of token
// g, and g + 8.
template <int Tokens>
struct FewX {
    PqWords<4> octet[Tokens / 8];
};
template <>
struct FewX<4> {
    uint32_t word[2];  // g % 2 and g % 2 + 2 of token g / 2
};

// sums[i] += x @ W^T for 32 columns, of which this thread has the octet whose codes are given. sums[i], output i of the
// run: up to 4 tokens, (token t, run g) is [0] + [3]; otherwise (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). For
// these, codewords are the operand of 8 columns, whose two registers are adjacent words of one codeword. The words of
// x, which are loaded in fours, have to be moved once; `zero`, of which the compiler does not know that it is 0, keeps
// it from moving them anew for every product. Of 8 tokens, rows g + 8 get any values, all different for the same
// reason, which no other row sees.
template <typename T, bool Inside, typename Code, int Width, bool InShared, int Run, int Tokens>
__device__ __forceinline__ void multiply_few(float (&sums)[Run][4], const Codewords<Width, InShared>& codewords,
                                             const typename Codewords<Width, InShared>::Source (&from)[8 / Width],
                                             const OctetCodes<Code, Width, Run>& codes, const FewX<Tokens>& x,
                                             uint32_t zero) {
    constexpr int kTogether = 4;  // runs whose products take turns, so that none waits for the one before
    uint32_t a[2][4];
    if constexpr (Tokens > 4) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                a[k][i] = x.octet[Tokens == 16 ? i % 2 : 0].word[2 * k + i / 2] ^ (Tokens == 8 && i % 2 ? ~zero : zero);
    }
#pragma unroll
    for (int first = 0; first < Run; first += kTogether) {
        PqWords<4> w[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
#pragma unroll
            for (int h = 0; h < 8 / Width; ++h) {
                const auto piece = codewords.template load<Code, Inside>(from[h], codes.run[h].at(first + i));
#pragma unroll
                for (int j = 0; j < Width / 2; ++j) w[i].word[h * (Width / 2) + j] = piece.word[j];
            }
        if constexpr (Tokens == 4) {
#pragma unroll
            for (int i = 0; i < kTogether; ++i) mma_m16n8k16<T>(sums[first + i], w[i].word, x.word);
        } else {
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const uint32_t b[2] = {w[i].word[2 * k], w[i].word[2 * k + 1]};
                    mma_m16n8k16<T>(sums[first + i], a[k], b);
                }
        }
    }
}

// The sums of a warp with codewords as the operand of 16 rows: R * 16 outputs and Tiles * 8 tokens.
template <int R, int Tiles>
struct PqSumsOfWarp {
    float of[R][Tiles][4] = {};

    // Of the run of this thread, output i and the token 8 * tile + 2t + odd.
    __device__ __forceinline__ float at(int i, int tile, int odd) const { return of[i / 2][tile][i % 2 * 2 + odd]; }
};

// sums += W @ x^T for 32 columns, of which this thread has the octet at `place`: the codes of its run, and x
// [token g of each tile][octet].
template <typename T, typename Code, int Width, bool InShared, int R, int Tiles>
__device__ __forceinline__ void multiply(PqSumsOfWarp<R, Tiles>& sums, const Codewords<Width, InShared>& codewords,
                                         const OctetCodes<Code, Width, 2 * R>& codes, const OctetPlace<Width>& place,
                                         int blocks, const PqWords<4> (&x)[Tiles]) {
#pragma unroll
    for (int h = 0; h < 8 / Width; ++h) {
        const auto from = codewords.source(place.piece[h], place.block[h] < blocks);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const auto upper = codewords.template load<Code>(from, codes.run[h].at(2 * r));
            const auto lower = codewords.template load<Code>(from, codes.run[h].at(2 * r + 1));
#pragma unroll
            for (int s = 0; s < Width / 4; ++s) {
                const uint32_t a[4] = {upper.word[2 * s], lower.word[2 * s], upper.word[2 * s + 1],
                                       lower.word[2 * s + 1]};
                const int k = h * (Width / 4) + s;
#pragma unroll
                for (int tile = 0; tile < Tiles; ++tile) {
                    const uint32_t b[2] = {x[tile].word[2 * k], x[tile].word[2 * k + 1]};
                    mma_m16n8k16<T>(sums.of[r][tile], a, b);
                }
            }
        }
    }
}

// sums += W^T @ grad^T for 32 outputs, of which this thread has 8 in one octet of columns, at `place`; `outputs` of
// them exist. grad [token g of each tile][8 outputs]. Two codewords are joined into pairs along
// the outputs, a byte permutation per word.
template <typename T, typename Code, int Width, bool InShared, int Tiles>
__device__ __forceinline__ void multiply_transposed(PqSumsOfWarp<4, Tiles>& sums,
                                                    const Codewords<Width, InShared>& codewords,
                                                    const OctetCodes<Code, Width, 8>& codes,
                                                    const OctetPlace<Width>& place, int blocks, int outputs,
                                                    const PqWords<4> (&grad)[Tiles]) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int h = 0; h < 8 / Width; ++h) {
            const auto from = codewords.source(place.piece[h], place.block[h] < blocks);
            PqWords<Width / 2> w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = codewords.template load<Code>(from, codes.run[h].at(4 * s + i));
            if (outputs < 8) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (4 * s + i >= outputs) w[i] = {};
            }
#pragma unroll
            for (int pair = 0; pair < Width / 2; ++pair) {
                const uint32_t a[4] = {__byte_perm(w[0].word[pair], w[1].word[pair], 0x5410),
                                       __byte_perm(w[0].word[pair], w[1].word[pair], 0x7632),
                                       __byte_perm(w[2].word[pair], w[3].word[pair], 0x5410),
                                       __byte_perm(w[2].word[pair], w[3].word[pair], 0x7632)};
#pragma unroll
                for (int tile = 0; tile < Tiles; ++tile) {
                    const uint32_t b[2] = {grad[tile].word[2 * s], grad[tile].word[2 * s + 1]};
                    mma_m16n8k16<T>(sums.of[h * (Width / 2) + pair][tile], a, b);
                }
            }
        }
}

// Writes Count adjacent values, those inside [0, left).
template <int Count, typename T>
__device__ __forceinline__ void store_run(T* to, const float (&values)[Count], int left, bool aligned) {
    if (aligned && left >= Count) {
        struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) {
            T value[Count];
        } run;
#pragma unroll
        for (int i = 0; i < Count; ++i) run.value[i] = from_float<T>(values[i]);
        *reinterpret_cast<decltype(run)*>(to) = run;
        return;
    }
#pragma unroll
    for (int i = 0; i < Count; ++i)
        if (i < left) to[i] = from_float<T>(values[i]);
}

// One token's values of adjacent places of the width, `first` on: to parts, or with the bias to y.
template <typename T, int Run>
__device__ __forceinline__ void write_run(const PqOutput& out, float (&run)[Run], int64_t token, int first, int m,
                                          int width, int split) {
    if (token >= m || first >= width) return;
    const int64_t at = token * width + first;
    if (out.parts) {
        store_run(out.parts + static_cast<int64_t>(split) * m * width + at, run, width - first, width % Run == 0);
        return;
    }
    if (out.bias) {
#pragma unroll
        for (int i = 0; i < Run; ++i)
            if (first + i < width) run[i] += out.bias[first + i];
    }
    store_run(static_cast<T*>(out.y) + at, run, width - first, width % Run == 0);
}

}  // namespace qnk
