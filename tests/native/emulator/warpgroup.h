// Asynchronous products of warpgroups, behind the functions of wgmma.h.
//
// A product of a warpgroup is one of each of its four warps, for the 16 rows that the warp has. It lands at the wait:
// until then its sums hold poison. What the hardware may read at any time between is read at both ends, and has to be
// the same: the registers of A, and the tile of B. The tile also has to be what it was at the last barrier to which
// all threads came with a fence of the async proxy; later writes might not be seen. A named barrier of all threads is
// one, too; for it a fence counts that came after the last barrier of this kind.
#pragma once

#include "scheduler.h"

namespace emulator {

// Hooks of the scheduler.
void start_of_block(int threads);
void end_of_barrier();
void comes_to_named_barrier(int id);  // the fiber that runs
void end_of_named_barrier(int id);    // one of all threads
void end_of_thread();
void end_of_block();

uint32_t shared_address(const void* pointer);
void fence_array(const float* d, size_t n);  // what wgmma_fence is given, one after another
void fence_array(const uint32_t* a);  // 4 words
void fence();  // after them
void fence_proxy();
void issue(float* d, int columns, const uint32_t* a, uint64_t b, double (*value)(uint16_t));
void issue_across(float* d, int columns, uint64_t a, uint64_t b, double (*value)(uint16_t));
void commit();
void wait(int pending);
void results(const float* d);

}  // namespace emulator
