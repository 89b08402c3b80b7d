// Threads from the OpenMP runtime that the process already has (torch's), found at load time.
//
// The runtime's entry points are weak symbols and no OpenMP library is linked: the kernels share torch's
// threads and torch.set_num_threads, work with any compiler, and run serially without a runtime.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "common/isa_namespace.h"

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_max_threads(void);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
__attribute__((weak)) int omp_in_parallel(void);
}

namespace qnk {
inline namespace QNK_ISA {

inline bool has_openmp() {
    return GOMP_parallel && omp_get_max_threads && omp_get_thread_num && omp_get_num_threads && omp_in_parallel;
}

inline int max_threads() { return has_openmp() && !omp_in_parallel() ? std::max(1, omp_get_max_threads()) : 1; }

// body(thread, threads) once on each thread of the team; `wanted` bounds the team.
template <typename Body>
void parallel(int64_t wanted, const Body& body) {
    const int threads = static_cast<int>(std::min<int64_t>(max_threads(), std::max<int64_t>(wanted, 1)));
    if (threads == 1) {
        body(0, 1);
        return;
    }
    GOMP_parallel(
        [](void* data) { (*static_cast<const Body*>(data))(omp_get_thread_num(), omp_get_num_threads()); },
        const_cast<Body*>(&body), static_cast<unsigned>(threads), 0);
}

// body(begin, end), or body(begin, end, thread), on a contiguous share of [0, n), whose bounds are multiples of `grain`
// (but the last).
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
    const int64_t pieces = (n + grain - 1) / grain;
    parallel(pieces, [&](int thread, int threads) {
        const int64_t begin = pieces * thread / threads * grain;
        const int64_t end = std::min(n, pieces * (thread + 1) / threads * grain);
        if (begin >= end) return;
        if constexpr (std::is_invocable_v<Body, int64_t, int64_t, int>)
            body(begin, end, thread);
        else
            body(begin, end);
    });
}

}  // namespace QNK_ISA
}  // namespace qnk
