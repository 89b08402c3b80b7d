// Reading a product-quantized weight in pieces of 4 or 8 elements, and rows of x in octets.
//
// Shared memory serves 128 bytes in a cycle, so that 8 lanes get 16 bytes each when no two of them need the same four
// banks. The table of codewords has as many copies side by side as a cycle serves lanes, and each lane reads its own:
// random codes never collide. A table that does not fit so often has fewer copies, or is read through the cache.
#pragma once

#include <type_traits>

#include "cuda/pq_linear.h"
#include "cuda/primitives.h"

namespace qnk {

constexpr int kSharedBytes = 96 * 1024;  // of a block, on every GPU since sm_80

template <int Words>
struct alignas(Words * 4) PqWords {
    uint32_t word[Words];
};

// The table [pieces, rows, copies, Width] in shared memory; its last row is 0. rows = 0: it does not fit.
struct CodewordTable {
    int rows, copies, bytes;
};

// Codes of one byte need no check, since all that they can name are rows.
inline CodewordTable codeword_table(const PqWeight& w, int width, int other_bytes, int limit = kSharedBytes) {
    const int rows = (w.code_bytes == 1 ? 256 : w.k) + 1;
    for (int copies = 128 / (2 * width); copies > 0; copies /= 2) {
        const int bytes = rows * copies * w.d * 2;
        if (bytes + other_bytes <= limit) return {rows, copies, bytes};
    }
    return {0, 0, 0};
}

template <int Width, bool InShared>
class Codewords {
  public:
    using Piece = PqWords<Width / 2>;

    // One piece of all codewords: that of code c is row_bytes * c from start on. row_bytes = 0: zeros.
    struct Source {
        const unsigned char* start;
        int row_bytes;
    };

    // reader: which copy this thread reads, modulo their number.
    __device__ Codewords(const PqWeight& w, const CodewordTable& table, const unsigned char* shared,
                         unsigned reader = threadIdx.x)
        : last_(w.k - 1) {
        const int copy = InShared ? static_cast<int>(reader) & (table.copies - 1) : 0;
        start_ = InShared ? shared + copy * sizeof(Piece) : static_cast<const unsigned char*>(w.codebook);
        row_bytes_ = InShared ? table.copies * static_cast<int>(sizeof(Piece)) : w.d * 2;
        piece_bytes_ = InShared ? table.rows * row_bytes_ : static_cast<int>(sizeof(Piece));
        zeros_ = (table.rows - 1) * row_bytes_;
    }

    __device__ __forceinline__ Source source(int piece, bool inside) const {
        return {start_ + (inside ? piece * piece_bytes_ : InShared ? zeros_ : 0), inside ? row_bytes_ : 0};
    }

    // Inside: `from` is known to be no source of zeros.
    template <typename Code, bool Inside = false>
    __device__ __forceinline__ Piece load(const Source& from, int code) const {
        if (!InShared && !Inside && from.row_bytes == 0) return {};
        return *reinterpret_cast<const Piece*>(from.start + existing<Code>(code) * from.row_bytes);
    }

    // Two elements, `word` of Width / 2, of piece `piece` of a codeword, from a table in shared memory.
    template <typename Code>
    __device__ __forceinline__ uint32_t load_word(int code, int piece, int word) const {
        static_assert(InShared);
        const int at = existing<Code>(code) * row_bytes_ + (piece * piece_bytes_ + word * 4);
        return *reinterpret_cast<const uint32_t*>(start_ + at);
    }

    // By all threads of a block, which has to wait for it. A piece is read once; lanes write its copies in turns that
    // keep them on different banks.
    static __device__ void fill(const PqWeight& w, const CodewordTable& table, unsigned char* shared) {
        if (!InShared) return;
        const auto* codebook = static_cast<const unsigned char*>(w.codebook);
        const int lines = table.rows * (w.d * 2 / static_cast<int>(sizeof(Piece)));
        for (int line = threadIdx.x; line < lines; line += blockDim.x) {
            const int piece = line < table.rows ? 0 : line / table.rows, row = line - piece * table.rows;
            const int code = row < w.k ? row : w.k - 1;
            Piece value = {};
            if (row < table.rows - 1)
                value = *reinterpret_cast<const Piece*>(codebook + code * w.d * 2 + piece * sizeof(Piece));
            auto* copies = reinterpret_cast<Piece*>(shared) + line * table.copies;
            for (int i = 0; i < table.copies; ++i) copies[(i + line) & (table.copies - 1)] = value;
        }
    }

  private:
    template <typename Code>
    __device__ __forceinline__ int existing(int code) const {
        return sizeof(Code) > 1 && code > last_ ? last_ : code;
    }

    const unsigned char* start_;
    int row_bytes_, piece_bytes_, zeros_, last_;
};

// Count codes of one block, for adjacent outputs.
template <typename Code, int Count>
struct CodeRun {
    static constexpr int kPerWord = 4 / sizeof(Code);
    PqWords<Count / kPerWord> codes;

    __device__ __forceinline__ int at(int i) const {
        const int selector = sizeof(Code) == 1 ? 0x4440 + i % 4 : i % 2 ? 0x4432 : 0x4410;
        return static_cast<int>(__byte_perm(codes.word[i / kPerWord], 0, selector));
    }

    // of outputs `first` on; 0 past the last output or the last block. Whole: n is known to be a multiple of Count.
    template <bool Whole = false>
    __device__ __forceinline__ void load(const PqWeight& w, int block, int first) {
        codes = {};
        if (block >= w.blocks || first >= w.n) return;
        const Code* from = static_cast<const Code*>(w.codes) + static_cast<int64_t>(block) * w.n + first;
        if (Whole || w.n % Count == 0) {
            codes = *reinterpret_cast<const PqWords<Count / kPerWord>*>(from);
            return;
        }
#pragma unroll
        for (int i = 0; i < Count; ++i)
            if (first + i < w.n)
                codes.word[i / kPerWord] |= static_cast<uint32_t>(from[i]) << (i % kPerWord * 8 * sizeof(Code));
    }
};

// Where the pieces of an octet of columns lie: one of 8 elements or two of 4. It moves along in even steps.
template <int Width>
struct OctetPlace {
    static constexpr int kParts = 8 / Width;
    int block[kParts], piece[kParts];

    __device__ OctetPlace(int octet, int pieces) {
#pragma unroll
        for (int h = 0; h < kParts; ++h) block[h] = octet * kParts + h, piece[h] = 0;
        if (pieces == 1) return;  // most often, and a division delays the first loads
#pragma unroll
        for (int h = 0; h < kParts; ++h) {
            piece[h] = block[h] % pieces;
            block[h] /= pieces;
        }
    }
    // by: the place of the octet so many octets from the first
    __device__ __forceinline__ void advance(const OctetPlace& by, int pieces) {
#pragma unroll
        for (int h = 0; h < kParts; ++h) {
            block[h] += by.block[0];
            piece[h] += by.piece[0];
            if (piece[h] >= pieces) piece[h] -= pieces, ++block[h];
        }
    }
};

// Elements first to first + 7 of a row [length] of 16-bit values, 0 past its end; rows are 16-byte aligned where length
// is a multiple of 8, which Whole says is known.
template <bool Whole = false, typename T>
__device__ __forceinline__ PqWords<4> load_octet(const T* row, int first, int length) {
    PqWords<4> octet = {};
    if (Whole || length % 8 == 0) {
        if (first < length) octet = *reinterpret_cast<const PqWords<4>*>(row + first);
        return octet;
    }
    const auto* bits = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (first + i < length) octet.word[i / 2] |= static_cast<uint32_t>(bits[first + i]) << (i % 2 * 16);
    return octet;
}

// The same of one of `rows`, or zeros where not inside, to shared memory: there after the next wait and barrier.
template <typename T>
__device__ __forceinline__ void stage_octet(PqWords<4>* to, const T* rows, int64_t row, bool inside, int first,
                                            int length) {
    if (length % 8 == 0) {
        inside = inside && first < length;
        cp_async_16(to, inside ? rows + row * length + first : rows, inside ? 16 : 0);
    } else {
        *to = inside ? load_octet(rows + row * length, first, length) : PqWords<4>{};
    }
}

// launch(code of the weight's type, width of its pieces, whether the table is in shared memory, the table). Codes of
// one byte always have one: 257 codewords of up to 64 elements take 33 KiB (fp32: 66).
template <typename Launch>
cudaError_t by_layout(const PqWeight& w, int other_bytes, const Launch& launch) {
    const auto of_width = [&](auto width) {
        const CodewordTable table = codeword_table(w, width, other_bytes);
        if (w.code_bytes == 1) return launch(uint8_t(), width, std::true_type(), table);
        if (table.rows > 0) return launch(uint16_t(), width, std::true_type(), table);
        return launch(uint16_t(), width, std::false_type(), table);
    };
    if (w.d % 8 == 0) return of_width(std::integral_constant<int, 8>());
    return of_width(std::integral_constant<int, 4>());
}

}  // namespace qnk
