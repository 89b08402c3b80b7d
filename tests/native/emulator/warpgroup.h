// Asynchronous products of warpgroups, behind the functions of wgmma.h.
//
// A product of a warpgroup is one of each of its four warps, for the 16 rows that the warp has. It lands at the wait:
// until then its sums hold poison. What the hardware may read at any time between is read at both ends, and has to be
// the same: the registers of A, and the tile of B. The tile also has to be what it was at the last barrier to which
// all threads came with a fence of the async proxy; later writes might not be seen.
#pragma once

#include "scheduler.h"

namespace emulator {

// Hooks of the scheduler.
void start_of_block(int threads);
void end_of_barrier();
void end_of_thread();
void end_of_block();

uint32_t shared_address(const void* pointer);
void fence_array(const float* d, size_t n);  // what wgmma_fence is given, one after another
void fence_array(const uint32_t* a, size_t n);
void fence();  // after them
void fence_proxy();
void issue(float* d, int columns, const uint32_t* a, uint64_t b, double (*value)(uint16_t));
void commit();
void wait(int pending);
void results(const float* d);

}  // namespace emulator
