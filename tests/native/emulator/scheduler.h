// CUDA threads as fibers of one OS thread: blocks one after another, and in a block a fiber runs until it waits for
// others at a barrier or a warp collective. What a GPU leaves undefined is reported, with block and thread.
// Not emulated: blocks that wait for each other, mbarriers, clusters and TMA.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Those of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;
extern size_t shared_limit;  // bytes of a block, static and dynamic ones together; see cuda.cpp

// Ends the launch, which returns an error with the position of this thread and the message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs the grid; returns false after fail(), a fault or a deadlock.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What the last run that returned false has to say.
const char* message();

// __syncthreads at file:line. Returns how many threads of the block came with a predicate that is true.
int barrier(bool predicate, const char* file, int line);

// bar.sync (waits) or bar.arrive with an id and a number of threads. What a GPU takes amiss fails: a thread that comes
// twice before the barrier completes, warps of which only some lanes come, arrivals that are left over.
void named_barrier(int id, int count, bool waits, const char* file, int line);

// Waits until all lanes of `mask` that have not exited are here with the same mask and combine. The last of them calls
// combine with the payload of each lane, null for those that are absent; then all go on.
using Combine = void (*)(void* const (&payload)[kLanes]);
void collective(uint32_t mask, Combine combine, void* payload, const char* name);

int thread(), lane();  // of the fiber that runs, in its block and warp

struct Copy {  // of cp.async, not landed yet
    unsigned char* to;
    const unsigned char* from;
    int size;        // of what is written
    int bytes;       // of them read, the rest 0
    unsigned group;  // commits of the thread before it
};
struct Copies {
    std::vector<Copy> pending;
    unsigned commits;
};
Copies& copies();  // of the fiber that runs

// Shared memory of the block: the array that `site` declares, and what the launch asked for. Poisoned per block.
void* shared_array(const void* site, size_t bytes, size_t alignment);
void* shared_memory();
size_t shared_memory_bytes();

}  // namespace emulator
