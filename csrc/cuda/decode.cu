// Weights written out in the dtype of x, a slice at a time, for products of many tokens by cuBLAS (cuda_dense.py).
//
// pq_decode: W[o, b * d + j] = codebook[codes[b, o], j]. Codes lie block by block and W row by row, so a block stages
// those of 32 blocks and 128 outputs in shared memory; a warp then writes runs of 32 codewords of four rows. Nothing is
// computed: elements of any dtype are moved as halves of 16 bits. Codewords of whole pieces of 4 or 8 halves come from
// copies side by side in shared memory (pq_codewords.cuh), others half by half through the cache.
// int_decode: W[o, j] = (q - z) * s in fp32, rounded to the dtype. A thread takes as many codes as make a store of 16
// bytes, four times, so that loads and stores of a warp are runs without gaps.
//
// Floors for 8192 x 8192 in bf16 in slices of 2048 outputs, which stay in the L2 cache; on an H200 the decoding of all
// slices took 35 to 40 (pq), 42 to 46 (int8) and 24 us (int4) of the product of 4096 tokens:
//   pq, d = 8: 8.4 MB of codes, 134 MB to the L2 cache = 34 us at 4 TB/s, and four starts of 2 us
//   int8: 67 MB of codes = 20 us at 3.35 TB/s, beside the same 34 us; int4: 34 MB
#include <algorithm>

#include "common/packing.h"
#include "cuda/pq_codewords.cuh"
#include "cuda/status.h"

namespace qnk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileBlocks = 32, kTileOutputs = 128;
constexpr int kRows = 4;        // of the weight, that a warp writes at a time
constexpr int kBlocksEach = 4;  // of a multiprocessor, which fill a table each, at most
constexpr int kPieces = 4;      // that a thread loads before it stores them

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As Codewords, of single halves, read through the cache.
class Halves {
  public:
    using Piece = uint16_t;
    using Source = const uint16_t*;

    __device__ Halves(const PqWeight& w, const CodewordTable&, const unsigned char*)
        : codebook_(static_cast<const uint16_t*>(w.codebook)), d_(w.d), last_(w.k - 1) {}
    __device__ __forceinline__ Source source(int piece, bool) const { return codebook_ + piece; }
    template <typename Code>
    __device__ __forceinline__ Piece load(Source from, int code) const {
        return from[(code < last_ ? code : last_) * d_];
    }
    static __device__ void fill(const PqWeight&, const CodewordTable&, unsigned char*) {}

  private:
    const uint16_t* codebook_;
    int d_, last_;
};

// out [count, blocks * d] <- rows first to first + count - 1 of the weight, in halves.
template <typename Code, typename Book>
__global__ void __launch_bounds__(kThreads) pq_decode_kernel(PqWeight w, CodewordTable table, uint16_t* out, int first,
                                                             int count) {
    using Piece = typename Book::Piece;
    constexpr int kRun = 16 / sizeof(Code), kRuns = kTileOutputs / kRun;
    constexpr int kWords = kTileOutputs * sizeof(Code) / 4;
    QNK_SHARED(uint32_t, tile, [kTileBlocks][kWords + 1]);  // codes; those of an output on different banks
    QNK_SHARED_MEMORY(shared);
    const Book book(w, table, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pieces = w.d * 2 / static_cast<int>(sizeof(Piece));  // of a codeword
    const int lane_block = lane / pieces, lane_piece = lane % pieces, step_blocks = 32 / pieces,
              step_pieces = 32 % pieces;
    const int64_t across = ceil_div(w.blocks, kTileBlocks), tiles = across * ceil_div(count, kTileOutputs);
    const int64_t row_pieces = static_cast<int64_t>(w.blocks) * pieces;
    Book::fill(w, table, shared);

    for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
        const int block = static_cast<int>(t % across) * kTileBlocks, row = static_cast<int>(t / across) * kTileOutputs;
        const int blocks = min(w.blocks - block, kTileBlocks), rows = min(count - row, kTileOutputs);
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int i = threadIdx.x; i < kTileBlocks * kRuns; i += kThreads) {
            const int b = i / kRuns, at = i % kRuns;
            CodeRun<Code, kRun> run;
            run.load(w, block + b, first + row + at * kRun);
#pragma unroll
            for (int word = 0; word < 4; ++word) tile[b][at * 4 + word] = run.codes.word[word];
        }
        __syncthreads();
        for (int o = warp * kRows; o < rows; o += kWarps * kRows) {
            Piece* to = reinterpret_cast<Piece*>(out) + (row + o) * row_pieces + static_cast<int64_t>(block) * pieces;
            int b = lane_block, piece = lane_piece;
            for (int i = lane; i < blocks * pieces; i += 32) {
                const auto from = book.source(piece, true);
                const Code* codes = reinterpret_cast<const Code*>(tile[b]) + o;
                Piece value[kRows];
#pragma unroll
                for (int r = 0; r < kRows; ++r) value[r] = book.template load<Code>(from, codes[r]);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
                    if (o + r < rows) to[r * row_pieces + i] = value[r];
                b += step_blocks, piece += step_pieces;
                if (piece >= pieces) piece -= pieces, ++b;
            }
        }
    }
}

template <typename Code, typename Book>
cudaError_t launch_pq(const PqWeight& w, const CodewordTable& table, uint16_t* out, int first, int count,
                      cudaStream_t stream) {
    const int64_t tiles = ceil_div(w.blocks, kTileBlocks) * ceil_div(count, kTileOutputs);
    const unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles, kBlocksEach * processors()));
    return launch(pq_decode_kernel<Code, Book>, grid, kThreads, table.bytes, stream, w, table, out, first, count);
}

cudaError_t pq_decode(const PqWeight& w, uint16_t* out, int first, int count, cudaStream_t stream) {
    if (w.d % 4 != 0)
        return w.code_bytes == 1 ? launch_pq<uint8_t, Halves>(w, {}, out, first, count, stream)
                                 : launch_pq<uint16_t, Halves>(w, {}, out, first, count, stream);
    return by_layout(w, kTileBlocks * (kTileOutputs * w.code_bytes + 4),
                     [&](auto code, auto width, auto in_shared, const CodewordTable& table) {
                         return launch_pq<decltype(code), Codewords<width, in_shared>>(w, table, out, first, count,
                                                                                      stream);
                     });
}

struct IntWeight {
    const uint8_t* codes;       // [n, k * bits / 8]
    const float* scale;         // [n, groups]
    const uint8_t* zero_point;  // [n, groups], or null: 2^(bits - 1)
    int64_t n, k, groups;

    __device__ __forceinline__ uint32_t zero(int64_t index, int bits) const {
        return zero_point ? zero_point[index] : 1u << (bits - 1);
    }
};

constexpr uint32_t kUnits = 0x4b000000u;  // fp32: 2^23, to which an integer is added by its bits

// (code - zero) * scale, where code and zero come with kUnits.
__device__ __forceinline__ float element(uint32_t code, uint32_t zero, float scale) {
    return __fmul_rn(__fsub_rn(__uint_as_float(code), __uint_as_float(zero)), scale);
}

__device__ __forceinline__ uint32_t pair(float low, float high, bf16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pair(float low, float high, f16) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <int Bytes>
struct UnsignedOf {
    using type = uint32_t;
};
template <>
struct UnsignedOf<2> {
    using type = uint16_t;
};
template <>
struct UnsignedOf<8> {
    using type = uint2;
};
__device__ __forceinline__ uint32_t word_of(uint2 codes, int i) { return i ? codes.y : codes.x; }
__device__ __forceinline__ uint32_t word_of(uint32_t codes, int) { return codes; }

// A piece of a row: what 16 bytes of T hold.
template <typename T, int Bits>
struct IntPiece {
    static constexpr int kCount = 16 / sizeof(T), kPerWord = 32 / Bits;
    using Codes = typename UnsignedOf<kCount * Bits / 8>::type;

    static __device__ __forceinline__ uint4 decode(const Codes& codes, uint32_t zero_point, float scale) {
        float value[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const uint32_t word = word_of(codes, i / kPerWord);
            const uint32_t code = Bits == 8 ? __byte_perm(word, kUnits, 0x7440 | i % kPerWord)
                                            : (word >> (i % kPerWord * Bits) & 15u) | kUnits;
            value[i] = element(code, kUnits | zero_point, scale);
        }
        uint32_t out[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4)
                out[i] = __float_as_uint(value[i]);
            else
                out[i] = pair(value[2 * i], value[2 * i + 1], T{});
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    }
};

// Rows of whole pieces, each within a group. 2^shift threads share a row.
template <typename T, int Bits>
__global__ void __launch_bounds__(kThreads) int_decode_kernel(IntWeight w, uint4* __restrict__ out, int shift) {
    using Piece = IntPiece<T, Bits>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads >> shift) + (threadIdx.x >> shift);
    if (row >= w.n) return;
    const unsigned threads = 1u << shift, all = static_cast<unsigned>(w.k / Piece::kCount);
    const unsigned of_group = all / static_cast<unsigned>(w.groups);
    const auto* codes = reinterpret_cast<const typename Piece::Codes*>(w.codes) + row * all;
    for (unsigned at = threadIdx.x & (threads - 1); at < all; at += kPieces * threads) {
        typename Piece::Codes piece[kPieces];
        uint32_t zero[kPieces];
        float scale[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const unsigned p = at + i * threads;
            if (p >= all) continue;
            const int64_t index = row * w.groups + (w.groups == 1 ? 0 : p / of_group);
            piece[i] = __ldcs(codes + p), zero[i] = w.zero(index, Bits), scale[i] = w.scale[index];
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            if (at + i * threads < all) out[row * all + at + i * threads] = Piece::decode(piece[i], zero[i], scale[i]);
    }
}

// Of any size, an element a thread.
template <typename T, int Bits>
__global__ void __launch_bounds__(kThreads) int_decode_general_kernel(IntWeight w, T* __restrict__ out) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= w.n * w.k) return;
    const int64_t row = at / w.k, column = at % w.k, index = row * w.groups + column / (w.k / w.groups);
    const uint32_t code = unpack_code(w.codes + row * (w.k * Bits / 8), column, Bits);
    out[at] = from_float<T>(element(kUnits | code, kUnits | w.zero(index, Bits), w.scale[index]));
}

bool starts_at(const void* pointer, size_t multiple) { return reinterpret_cast<uintptr_t>(pointer) % multiple == 0; }

template <typename T, int Bits>
cudaError_t int_decode(const IntWeight& w, void* out, cudaStream_t stream) {
    using Piece = IntPiece<T, Bits>;
    const bool whole = w.k % w.groups == 0 && w.k / w.groups % Piece::kCount == 0;
    if (!whole || !starts_at(out, 16) || !starts_at(w.codes, sizeof(typename Piece::Codes)))
        return launch(int_decode_general_kernel<T, Bits>, static_cast<unsigned>(ceil_div(w.n * w.k, kThreads)), kThreads,
                      0, stream, w, static_cast<T*>(out));
    int shift = 5;
    while (shift < 8 && w.k / Piece::kCount > kPieces << shift) ++shift;
    const int64_t blocks = ceil_div(w.n, kThreads >> shift);
    return launch(int_decode_kernel<T, Bits>, static_cast<unsigned>(blocks), kThreads, 0, stream, w,
                  static_cast<uint4*>(out), shift);
}

template <typename T>
int int_decode(const IntWeight& w, void* out, int bits, cudaStream_t stream) {
    return cuda_status(bits == 4 ? int_decode<T, 4>(w, out, stream) : int_decode<T, 8>(w, out, stream));
}

}  // namespace
}  // namespace qnk

int qnk_cuda_pq_decode(const void* codes, int code_bytes, const void* codebook, int dtype, void* out, int64_t n,
                       int64_t blocks, int64_t k, int64_t d, int64_t first, int64_t count, void* stream) {
    if (dtype != QNK_F32 && dtype != QNK_BF16 && dtype != QNK_F16) return QNK_BAD_DTYPE;
    if (count == 0 || blocks == 0) return QNK_OK;
    const qnk::PqWeight w{codes, codebook, code_bytes, static_cast<int>(n), static_cast<int>(blocks),
                          static_cast<int>(k), static_cast<int>(dtype == QNK_F32 ? 2 * d : d)};
    return qnk::cuda_status(qnk::pq_decode(w, static_cast<uint16_t*>(out), static_cast<int>(first),
                                           static_cast<int>(count), static_cast<cudaStream_t>(stream)));
}

int qnk_cuda_int_decode(const uint8_t* weight, const float* scale, const uint8_t* zero_point, void* out, int out_dtype,
                        int64_t n, int64_t k, int64_t groups, int bits, void* stream) {
    if (bits != 4 && bits != 8) return QNK_BAD_BITS;
    if (n == 0 || k == 0) return QNK_OK;
    const qnk::IntWeight w{weight, scale, zero_point, n, k, groups};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (out_dtype) {
        case QNK_F32: return qnk::int_decode<float>(w, out, bits, on);
        case QNK_BF16: return qnk::int_decode<qnk::bf16>(w, out, bits, on);
        case QNK_F16: return qnk::int_decode<qnk::f16>(w, out, bits, on);
        default: return QNK_BAD_DTYPE;
    }
}
