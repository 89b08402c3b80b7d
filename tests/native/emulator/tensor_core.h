// The instructions of cuda/primitives.h, with the fragments of the PTX ISA. Included by cuda.h.
#pragma once

namespace qnk {

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <typename A, typename B>
void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace qnk

namespace emulator {

template <typename D>
struct Fragments {
    D* d;               // 4
    const uint32_t* a;  // 4
    const uint32_t* b;  // 2
};

// A sum as tensor cores take it: terms aligned to the largest and cut off 2 bits below fp32's last, then the sum cut
// off at fp32's, never rounded to nearest (measured on A100 by Fasi et al., PeerJ CS 7:e330, 2021).
inline float tensor_core_sum(const float* terms_a, const float* terms_b, int n, float c) {
    double products[17], largest = fabs(static_cast<double>(c));
    for (int i = 0; i < n; ++i) {
        products[i] = static_cast<double>(terms_a[i]) * static_cast<double>(terms_b[i]);
        largest = fmax(largest, fabs(products[i]));
        if (!(fabs(products[i]) < HUGE_VAL)) largest = HUGE_VAL;
    }
    if (!(largest < HUGE_VAL) || c != c) {
        double sum = c;
        for (int i = 0; i < n; ++i) sum += products[i];
        return static_cast<float>(sum);
    }
    if (largest == 0.0) return 0.0f;
    const double unit = ldexp(1.0, std::max(ilogb(largest), -126) - 25), inverse = 1.0 / unit;
    int64_t sum = static_cast<int64_t>(static_cast<double>(c) * inverse);
    for (int i = 0; i < n; ++i) sum += static_cast<int64_t>(products[i] * inverse);
    const double exact = static_cast<double>(sum) * unit;
    const float nearest = static_cast<float>(exact);
    return fabs(static_cast<double>(nearest)) > fabs(exact) && nearest - nearest == 0.0f ? nextafterf(nearest, 0.0f)
                                                                                      : nearest;
}

template <typename D>
const Fragments<D>& fragments_of(void* const (&payload)[kLanes], int lane) {
    return *static_cast<const Fragments<D>*>(payload[lane]);
}

inline void need_all(void* const (&payload)[kLanes], const char* name) {
    for (void* one : payload)
        if (!one) fail("%s without all 32 lanes", name);
}

// Element (row, column) of a [16, columns * 2] in elements of `size` bytes: word and byte in the lane that holds it.
template <typename D, typename T>
T element_a(void* const (&payload)[kLanes], int row, int k) {
    constexpr int per_word = 4 / sizeof(T), half = 4 * per_word;
    const int holder = row % 8 * 4 + k % half / per_word, word = row / 8 + 2 * (k / half);
    T value;
    memcpy(&value, reinterpret_cast<const unsigned char*>(fragments_of<D>(payload, holder).a + word) +
                       k % per_word * sizeof(T), sizeof(T));
    return value;
}

template <typename D, typename T>
T element_b(void* const (&payload)[kLanes], int k, int column) {
    constexpr int per_word = 4 / sizeof(T), half = 4 * per_word;
    const int holder = column * 4 + k % half / per_word, word = k / half;
    T value;
    memcpy(&value, reinterpret_cast<const unsigned char*>(fragments_of<D>(payload, holder).b + word) +
                       k % per_word * sizeof(T), sizeof(T));
    return value;
}

template <typename D>
D& element_d(void* const (&payload)[kLanes], int row, int column) {
    return fragments_of<D>(payload, row % 8 * 4 + column / 2).d[row / 8 * 2 + column % 2];
}

template <typename T>
void combine_mma_float(void* const (&payload)[kLanes]) {
    need_all(payload, "mma_m16n8k16");
    float a[16][16], b[8][16];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) a[row][k] = qnk::to_float(element_a<float, T>(payload, row, k));
        for (int column = 0; column < 8; ++column)
            b[column][k] = qnk::to_float(element_b<float, T>(payload, k, column));
    }
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float& d = element_d<float>(payload, row, column);
            for (int k = 0; k < 16; k += 8) d = tensor_core_sum(a[row] + k, b[column] + k, 8, d);
        }
}

template <typename A, typename B>
void combine_mma_integer(void* const (&payload)[kLanes]) {
    need_all(payload, "mma_m16n8k32");
    int a[16][32], b[8][32];
    for (int k = 0; k < 32; ++k) {
        for (int row = 0; row < 16; ++row) a[row][k] = element_a<int32_t, A>(payload, row, k);
        for (int column = 0; column < 8; ++column) b[column][k] = element_b<int32_t, B>(payload, k, column);
    }
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            uint32_t sum = static_cast<uint32_t>(element_d<int32_t>(payload, row, column));
            for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[column][k]);
            element_d<int32_t>(payload, row, column) = static_cast<int32_t>(sum);
        }
}

struct MatrixLoad {
    const unsigned char* row;
    uint32_t* word;
};

template <int Count, bool Transposed>
void combine_ldmatrix(void* const (&payload)[kLanes]) {
    need_all(payload, "ldmatrix");
    for (int i = 0; i < Count; ++i)
        for (int lane = 0; lane < kLanes; ++lane)
            for (int j = 0; j < 2; ++j) {
                const int along = lane / 4, across = lane % 4 * 2 + j;
                const int row = Transposed ? across : along, column = Transposed ? along : across;
                memcpy(reinterpret_cast<unsigned char*>(static_cast<MatrixLoad*>(payload[lane])->word + i) + 2 * j,
                       static_cast<MatrixLoad*>(payload[8 * i + row])->row + 2 * column, 2);
            }
}

template <int Count, bool Transposed>
void ldmatrix(uint32_t* word, const void* row) {
    if (lane() < 8 * Count && reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from a misaligned row");
    MatrixLoad payload{static_cast<const unsigned char*>(row), word};
    collective(0xffffffffu, combine_ldmatrix<Count, Transposed>, &payload, Transposed ? "ldmatrix_trans" : "ldmatrix");
}

}  // namespace emulator

namespace qnk {

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::Fragments<float> payload{d, a, b};
    emulator::collective(0xffffffffu, emulator::combine_mma_float<T>, &payload, "mma_m16n8k16");
}

inline void mma_m16n8k16_from(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    memcpy(d, c, sizeof d);
    mma_m16n8k16<f16>(d, a, b);
}

template <typename A, typename B>
void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::Fragments<int32_t> payload{d, a, b};
    emulator::collective(0xffffffffu, emulator::combine_mma_integer<A, B>, &payload, "mma_m16n8k32");
}

inline void ldmatrix_x4(uint32_t (&word)[4], const void* row) { emulator::ldmatrix<4, false>(word, row); }
inline void ldmatrix_x4_trans(uint32_t (&word)[4], const void* row) { emulator::ldmatrix<4, true>(word, row); }
inline void ldmatrix_x2(uint32_t (&word)[2], const void* row) { emulator::ldmatrix<2, false>(word, row); }
inline void ldmatrix_x2_trans(uint32_t (&word)[2], const void* row) { emulator::ldmatrix<2, true>(word, row); }

// The copy happens at the wait. Until then its target holds poison, as what is there on a GPU is undefined.
inline void cp_async_16(void* to, const void* from, int bytes = 16) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16))
        emulator::fail("cp_async_16 with a misaligned address");
    if (bytes < 0 || bytes > 16) emulator::fail("cp_async_16 of %d bytes", bytes);
    memset(to, emulator::kPoison, 16);
    emulator::Copies& copies = emulator::copies();
    copies.pending.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, copies.commits});
}

inline void cp_async_commit() { ++emulator::copies().commits; }

template <int Pending>
void cp_async_wait() {
    emulator::Copies& copies = emulator::copies();
    auto& pending = copies.pending;
    size_t landed = 0;
    for (; landed < pending.size() && pending[landed].group + Pending < copies.commits; ++landed) {
        const emulator::Copy& copy = pending[landed];
        memset(copy.to, 0, 16);
        if (copy.bytes) memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    pending.erase(pending.begin(), pending.begin() + static_cast<ptrdiff_t>(landed));
}

template <int Table>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 8; ++i)
        if (Table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

}  // namespace qnk
