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

float tensor_core_sum(const double* a, const double* b, int n, float c);  // n <= 16
template <typename T>
void combine_mma_float(void* const (&payload)[kLanes]);
template <typename A, typename B>
void combine_mma_integer(void* const (&payload)[kLanes]);

inline void need_all(void* const (&payload)[kLanes], const char* name) {
    for (void* one : payload)
        if (!one) fail("%s without all 32 lanes", name);
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

inline void prefetch_l2(const void*) {}
inline uint4 load_once_16(const void* global) { return *static_cast<const uint4*>(global); }

// The copy happens at the wait. Until then its target holds poison, as what is there on a GPU is undefined.
template <int Size>
void cp_async(void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % Size || (bytes && reinterpret_cast<uintptr_t>(from) % Size))
        emulator::fail("cp_async_%d with a misaligned address", Size);
    if (bytes < 0 || bytes > Size) emulator::fail("cp_async_%d of %d bytes", Size, bytes);
    memset(to, emulator::kPoison, Size);
    emulator::Copies& copies = emulator::copies();
    copies.pending.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), Size, bytes, copies.commits});
}
inline void cp_async_16(void* to, const void* from, int bytes = 16) { cp_async<16>(to, from, bytes); }
inline void cp_async_4(void* to, const void* from, int bytes = 4) { cp_async<4>(to, from, bytes); }

inline void cp_async_commit() { ++emulator::copies().commits; }

template <int Pending>
void cp_async_wait() {
    emulator::Copies& copies = emulator::copies();
    auto& pending = copies.pending;
    size_t landed = 0;
    for (; landed < pending.size() && pending[landed].group + Pending < copies.commits; ++landed) {
        const emulator::Copy& copy = pending[landed];
        memset(copy.to, 0, static_cast<size_t>(copy.size));
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
