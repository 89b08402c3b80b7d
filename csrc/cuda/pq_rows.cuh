// W or W^T as the operand A of wgmma, from codewords in shared memory into registers.
//
// A thread has four adjacent rows: those g and g + 8 of its warp in each of two products. A step is 64 of k, in two
// halves: load_codes() of a step, and then, after next_step(), decode<0>() and decode<1>() of it. Rows past the end
// repeat others: sums of theirs are not written. Past the end of k the registers are 0, as codewords may be infinite;
// only the last step has to look at that.
#pragma once

#include "cuda/pq_codewords.cuh"

namespace qnk {

constexpr int kRowsOfThread = 4;

// The registers of A of two products of 16 of k, for both m64 of a warpgroup.
using HalfStep = uint32_t[2][2][4];

// Codes of Count adjacent outputs, at a multiple of their size.
template <typename Code, int Count>
struct Codes {
    static constexpr int kBytes = Count * sizeof(Code), kBits = 8 * sizeof(Code);
    using Whole = std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, PqWords<2>>>;
    Whole whole;

    __device__ __forceinline__ void load(const Code* from) { whole = *reinterpret_cast<const Whole*>(from); }
    __device__ __forceinline__ int at(int i) const {
        uint32_t word;
        if constexpr (kBytes == 8)
            word = whole.word[i * kBits / 32];
        else
            word = whole;
        return static_cast<int>(word >> i * kBits % 32 & ((1u << kBits) - 1));
    }
};

// Rows of A that are outputs, four adjacent ones of a thread. It reads its words of an octet of columns from one piece:
// the octet, or that half of it. A block has 1 << shift pieces.
template <typename Code, int Width>
class RowsOfOutputs {
  public:
    __device__ RowsOfOutputs(const PqWeight& w, int first_row, int first_step, int t)
        : codes_of_row_(static_cast<const Code*>(w.codes) + min(first_row, w.n - kRowsOfThread)), n_(w.n),
          blocks_(w.blocks), word_(t % (Width / 2)), part_(t / (Width / 2)), step_(first_step) {
        while (Width << shift_ < w.d) ++shift_;
    }

    // Those of `step`, for the next_step().
    __device__ __forceinline__ void load_codes(int step) {
#pragma unroll
        for (int octet = 0; octet < 8; ++octet) {
            const int block = min(piece(step, octet) >> shift_, blocks_ - 1);
            next_[octet].load(codes_of_row_ + static_cast<int64_t>(block) * n_);
        }
    }
    __device__ __forceinline__ void next_step() {
#pragma unroll
        for (int octet = 0; octet < 8; ++octet) codes_[octet] = next_[octet];
    }
    template <int Half>
    __device__ __forceinline__ void decode(HalfStep& a, const Codewords<Width, true>& codewords) {
#pragma unroll
        for (int octet = 0; octet < 4; ++octet) {
            const int piece_of_block = piece(step_, Half * 4 + octet) & ((1 << shift_) - 1);
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i)
                a[octet / 2][i / 2][i % 2 + octet % 2 * 2] =
                    codewords.template load_word<Code>(codes_[Half * 4 + octet].at(i), piece_of_block, word_);
        }
        if (piece(step_, 8) > blocks_ << shift_) {
#pragma unroll
            for (int octet = 0; octet < 4; ++octet)
                if (piece(step_, Half * 4 + octet) >> shift_ >= blocks_)
#pragma unroll
                    for (int i = 0; i < kRowsOfThread; ++i) a[octet / 2][i / 2][i % 2 + octet % 2 * 2] = 0;
        }
        step_ += Half;
    }

  private:
    __device__ __forceinline__ int piece(int step, int octet) const {
        return (step * 8 + octet) * (8 / Width) + part_;
    }

    const Code* codes_of_row_;
    int n_, blocks_, shift_ = 0, word_, part_, step_;
    Codes<Code, kRowsOfThread> codes_[8], next_[8];
};

// Rows of A that are columns, a quad of one block. d is a multiple of 4. Of 8 outputs this thread has two.
template <typename Code>
class RowsOfColumns {
  public:
    __device__ RowsOfColumns(const PqWeight& w, int first_row, int first_step, int t)
        : n_(w.n), pair_(2 * t), output_(first_step * 64) {
        const int quad = min(first_row / 4, w.columns() / 4 - 1), pieces = w.d / 4;
        piece_ = quad % pieces;
        codes_of_block_ = static_cast<const Code*>(w.codes) + static_cast<int64_t>(quad / pieces) * n_;
    }

    __device__ __forceinline__ void load_codes(int step) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            next_[i].load(codes_of_block_ + (min(step * 64 + i * 8, n_ - 8) + pair_));
    }
    __device__ __forceinline__ void next_step() {
#pragma unroll
        for (int i = 0; i < 8; ++i) codes_[i] = next_[i];
    }
    template <int Half>
    __device__ __forceinline__ void decode(HalfStep& a, const Codewords<4, true>& codewords) {
        const auto from = codewords.source(piece_, true);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto even = codewords.template load<Code>(from, codes_[Half * 4 + i].at(0));
            const auto odd = codewords.template load<Code>(from, codes_[Half * 4 + i].at(1));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                a[i / 2][r][i % 2 * 2] = __byte_perm(even.word[r], odd.word[r], 0x5410);
                a[i / 2][r][i % 2 * 2 + 1] = __byte_perm(even.word[r], odd.word[r], 0x7632);
            }
        }
        if (output_ + 32 > n_) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (output_ + i * 8 >= n_)
#pragma unroll
                    for (int r = 0; r < 2; ++r) a[i / 2][r][i % 2 * 2] = a[i / 2][r][i % 2 * 2 + 1] = 0;
        }
        output_ += 32;
    }

  private:
    const Code* codes_of_block_;
    int n_, pair_, piece_, output_;
    Codes<Code, 2> codes_[8], next_[8];
};

}  // namespace qnk
