// The functions of cuda/wgmma.h. Included by cuda.h.
#pragma once

#include "warpgroup.h"

namespace qnk {

constexpr bool kHasWgmma = true;

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
inline void fence_async_shared() { emulator::fence_proxy(); }

namespace wgmma {

// The innermost arrays are the unit: d of one product, or A of one.
template <typename T, int Count>
void fence_arrays(T (&array)[Count]) {
    if constexpr (std::is_array_v<T>)
        for (T& inner : array) fence_arrays(inner);
    else
        emulator::fence_array(array, Count);
}
template <typename T, int Count>
void results_of(T (&array)[Count]) {
    if constexpr (std::is_array_v<T>)
        for (T& inner : array) results_of(inner);
    else
        emulator::results(array);
}
template <typename T>
double value(uint16_t bits) {
    return to_float(bits_as<T>(bits));
}

}  // namespace wgmma

template <typename... Arrays>
void wgmma_fence(Arrays&... registers) {
    (wgmma::fence_arrays(registers), ...);
    emulator::fence();
}
template <typename T, int Count>
void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b) {
    static_assert(Count == 32 || Count == 64 || Count == 128);
    emulator::issue(d, 2 * Count, a, b, wgmma::value<T>);
}
inline void wgmma_commit() { emulator::commit(); }
template <int Pending>
void wgmma_wait() {
    emulator::wait(Pending);
}
template <typename Array>
void wgmma_results(Array& d) {
    wgmma::results_of(d);
}

}  // namespace qnk
