// Products of tensor cores, apart from the kernels so that they are compiled for speed.
#include "cuda.h"

namespace emulator {

// A sum as tensor cores take it: terms aligned to the largest and cut off 2 bits below fp32's last, then the sum cut
// off at fp32's, never rounded to nearest (measured on A100 by Fasi et al., PeerJ CS 7:e330, 2021).
float tensor_core_sum(const double* a, const double* b, int n, float c) {
    double products[16], largest = fabs(static_cast<double>(c)), plain = c;
    for (int i = 0; i < n; ++i) {
        products[i] = a[i] * b[i];
        plain += products[i];
        largest = std::max(largest, fabs(products[i]));
    }
    if (!(fabs(plain) < HUGE_VAL)) return static_cast<float>(plain);
    if (largest == 0.0) return 0.0f;
    const int exponent = std::max(static_cast<int>(bits_as<uint64_t>(largest) >> 52) - 1023, -126) - 25;
    const double unit = bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52);
    const double inverse = bits_as<double>(static_cast<uint64_t>(1023 - exponent) << 52);
    int64_t sum = static_cast<int64_t>(static_cast<double>(c) * inverse);
    for (int i = 0; i < n; ++i) sum += static_cast<int64_t>(products[i] * inverse);
    const double exact = static_cast<double>(sum) * unit;
    const float nearest = static_cast<float>(exact);
    const bool away = fabs(static_cast<double>(nearest)) > fabs(exact) && fabsf(nearest) < HUGE_VALF;
    return away ? nextafterf(nearest, 0.0f) : nearest;
}

namespace {

template <typename D>
const Fragments<D>& fragments_of(void* const (&payload)[kLanes], int lane) {
    return *static_cast<const Fragments<D>*>(payload[lane]);
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

}  // namespace

template <typename T>
void combine_mma_float(void* const (&payload)[kLanes]) {
    need_all(payload, "mma_m16n8k16");
    double a[16][16], b[8][16];
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

template void combine_mma_float<qnk::bf16>(void* const (&)[kLanes]);
template void combine_mma_float<qnk::f16>(void* const (&)[kLanes]);
template void combine_mma_integer<int8_t, int8_t>(void* const (&)[kLanes]);
template void combine_mma_integer<int8_t, uint8_t>(void* const (&)[kLanes]);
template void combine_mma_integer<uint8_t, int8_t>(void* const (&)[kLanes]);
template void combine_mma_integer<uint8_t, uint8_t>(void* const (&)[kLanes]);

}  // namespace emulator
