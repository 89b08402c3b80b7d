// Packed integer codes to values (q - z) * s of any dtype, a vector at a time.
#pragma once

#include <type_traits>

#include "cpu/int_weight.h"

namespace qnk {
inline namespace QNK_ISA {

// The values of one group; q - z is exact, so each is the product rounded once to fp32.
template <int Bits>
class GroupDecoder {
  public:
    GroupDecoder(float z, float s) : z_(z), s_(s) {
#if defined(__AVX512F__)
        const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        if (Bits == 4) values_ = (Vec{codes} - splat(z)) * splat(s);
#endif
    }

    float one(const uint8_t* row, int64_t i) const { return (static_cast<float>(unpack_code(row, i, Bits)) - z_) * s_; }

    // Of kLanes codes from the beginning of a byte.
    Vec lanes(const uint8_t* codes) const {
#if defined(__AVX512F__)
        if constexpr (Bits == 4) {
            // Each lane gets its code in its low four bits, all that a permutation looks at.
            int64_t packed;
            memcpy(&packed, codes, 8);
            const __m512i at = _mm512_setr_epi64(0x400000000, 0xc00000008, 0x1400000010, 0x1c00000018, 0x2400000020,
                                                 0x2c00000028, 0x3400000030, 0x3c00000038);
            const __m512i lanes = _mm512_multishift_epi64_epi8(at, _mm512_set1_epi64(packed));
            return {_mm512_permutexvar_ps(lanes, values_.v)};
        }
#endif
        return (load_codes(codes) - splat(z_)) * splat(s_);
    }

  private:
    static Vec load_codes(const uint8_t* codes) {
        if constexpr (Bits == 8) return load(codes);
#if defined(__AVX512F__)
        return splat(0.0f);  // 4 bits take the table
#elif defined(__AVX2__)
        int packed;
        memcpy(&packed, codes, 4);
        const __m128i bytes = _mm_cvtsi32_si128(packed), nibble = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(bytes, nibble), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)))};
#else
        return lanewise([&](int i) { return static_cast<float>(unpack_code(codes, i, 4)); });
#endif
    }

    float z_, s_;
#if defined(__AVX512F__)
    Vec values_{};  // of codes 0 to 15
#endif
};

struct PlainStore {
    template <typename T>
    void operator()(T* to, Vec value) const {
        store(to, value);
    }
};

#if defined(__AVX512BF16__)
// Where no value is subnormal or NaN, of which the instruction makes something else.
struct NormalStore {
    void operator()(bf16* to, Vec value) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value.v));
    }
};
#endif

// out [count] <- values of elements first, first + 1, ... of a row, all in one group.
template <int Bits, typename T, typename Store>
void decode_span(const uint8_t* row, int64_t first, int64_t count, const GroupDecoder<Bits>& group, T* out,
                 const Store& put) {
    if (Bits == 4 && first % 2 && count) {
        *out++ = from_float<T>(group.one(row, first++));
        --count;
    }
    const uint8_t* codes = row + first * Bits / 8;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put(out + i, group.lanes(codes + i * Bits / 8));
    if (Bits == 4 && count % 2) {
        --count;
        out[count] = from_float<T>(group.one(codes, count));
    }
    if (i >= count) return;
    if (count >= kLanes) {  // the last vector overlaps the one before
        put(out + count - kLanes, group.lanes(codes + (count - kLanes) * Bits / 8));
        return;
    }
    for (; i < count; ++i) out[i] = from_float<T>(group.one(codes, i));
}

// Columns of a weight, and where its groups lie among them.
struct Columns {
    int64_t begin, end, group_size, group;  // group: that of begin

    Columns(const Packed& w, int64_t begin, int64_t end)
        : begin(begin), end(end), group_size(w.group_size()), group(begin / group_size) {}
};

template <int Bits, typename T>
void decode_bits(const Packed& w, int64_t r, const Columns& columns, T* out) {
    const uint8_t* row = w.row(r);
    int64_t i = columns.begin, stop = (columns.group + 1) * columns.group_size;
    for (int64_t g = columns.group; i < columns.end; ++g, stop += columns.group_size) {
        const int64_t count = (stop < columns.end ? stop : columns.end) - i;
        const float s = w.scale[r * w.groups + g];
        const GroupDecoder<Bits> group(static_cast<float>(w.zero_point(r, g)), s);
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, bf16>) {
            const uint32_t magnitude = float_bits(s) & 0x7fffffffu;
            if (magnitude >= 0x00800000u && magnitude < 0x7f800000u) {
                decode_span(row, i, count, group, out, NormalStore());
            } else {
                decode_span(row, i, count, group, out, PlainStore());
            }
        } else
#endif
            decode_span(row, i, count, group, out, PlainStore());
        i += count;
        out += count;
    }
}

// out [end - begin] <- (q - z) * s of some columns of a row, in fp32, then rounded to T.
template <typename T>
void decode(const Packed& w, int64_t r, const Columns& columns, T* out) {
    if (w.bits == 8)
        decode_bits<8>(w, r, columns, out);
    else
        decode_bits<4>(w, r, columns, out);
}

// out [count] <- q - z of columns first, first + 1, ... of a row, all in group g.
inline void decode_levels(const Packed& w, int64_t r, int64_t g, int64_t first, int64_t count, int16_t* out) {
    const int zero = w.zero_point(r, g);
    const uint8_t* codes = w.row(r) + first * w.bits / 8;
    int64_t i = 0;
#if defined(__AVX2__)
    const __m256i zeros = _mm256_set1_epi16(static_cast<short>(zero));
    const auto put = [&](int64_t at, __m128i bytes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes), zeros));
    };
    if (w.bits == 8) {
        for (; i + 16 <= count; i += 16) put(i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    } else if (first % 2 == 0) {
        const __m128i nibble = _mm_set1_epi8(15);
        for (; i + 32 <= count; i += 32) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
            const __m128i low = _mm_and_si128(bytes, nibble), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
            put(i, _mm_unpacklo_epi8(low, high));
            put(i + 16, _mm_unpackhi_epi8(low, high));
        }
    }
#endif
    if (w.bits == 8) {
        for (; i < count; ++i) out[i] = static_cast<int16_t>(codes[i] - zero);
        return;
    }
    if (first % 2 == 0) {
        for (; i + 2 <= count; i += 2) {
            out[i] = static_cast<int16_t>((codes[i / 2] & 15) - zero);
            out[i + 1] = static_cast<int16_t>((codes[i / 2] >> 4) - zero);
        }
    }
    for (; i < count; ++i) out[i] = static_cast<int16_t>(static_cast<int>(unpack_code(w.row(r), first + i, 4)) - zero);
}

// Asks for what decode will read.
inline void prefetch(const Packed& w, int64_t r, const Columns& columns) {
    const uint8_t *line = w.row(r) + columns.begin * w.bits / 8, *last = w.row(r) + columns.end * w.bits / 8;
    for (; line < last; line += 64) __builtin_prefetch(line);
    __builtin_prefetch(w.scale + r * w.groups + columns.group);
    if (w.zero) __builtin_prefetch(w.zero + r * w.groups + columns.group);
}

}  // namespace QNK_ISA
}  // namespace qnk
