#include "scheduler.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "faults.h"
#include "memory.h"
#include "warpgroup.h"
#include "writes.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

size_t shared_limit = 163 * 1024;  // of 8.0

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 * 1024, kStackGuard = 4096;
constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr int kBarriers = 16;

enum class State { Ready, Barrier, Named, Collective, Exited };

struct Fiber {
    jmp_buf at;
    bool started = false;  // its stack exists, and it stands at `at`
    State state = State::Exited;
    const char* where = "";  // file of the barrier, or name of the collective, that it waits at
    int line = 0;
    int id = 0;  // of the named barrier
    bool predicate = false;
    int counted = 0;  // predicates of the last barrier
    uint32_t mask = 0;
    Combine combine = nullptr;
    void* payload = nullptr;
    Copies copies{};
};

// In which order the fibers run: the lowest as far as it gets, the highest, or a random one. Kernels whose result
// depends on it lack a barrier.
enum Order { Lowest, Highest, Shuffled };

struct Named {
    enum Came : char { No, Arrived, Waits };
    int needed = 0, count = 0;  // threads to complete it, and those that have come
    Came came[kMaxThreads] = {};
};

Fiber fibers[kMaxThreads];
Named named[kBarriers];
unsigned char* stacks = nullptr;
int threads = 0, current = 0, waiting = 0;
uint32_t in_collective[kMaxThreads / kLanes], exited[kMaxThreads / kLanes];  // lanes of each warp
const std::function<void()>* kernel_ = nullptr;
jmp_buf scheduler;
sigjmp_buf aborted;
char message_[4096] = "";
Order order = Lowest;
std::mt19937 random_;

std::map<const void*, std::unique_ptr<Guarded>> shared_arrays;
std::unique_ptr<Guarded> shared_memory_;

void set_position(int thread) {
    current = thread;
    const unsigned t = static_cast<unsigned>(thread);
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

void switch_to_scheduler() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

void complete_collective(int warp);

void fiber_main() {
    for (;;) {
        (*kernel_)();
        end_of_thread();
        fibers[current].state = State::Exited;
        exited[current / kLanes] |= 1u << lane();
        complete_collective(current / kLanes);  // those that wait need not wait for this one
        switch_to_scheduler();
    }
}

void start(Fiber& fiber) {
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + current * (kStack + kStackGuard) + kStackGuard;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    fiber.started = true;
    setcontext(&context);
}

void resume(int thread) {
    set_position(thread);
    if (_setjmp(scheduler) != 0) return after_run_of_thread();
    Fiber& fiber = fibers[thread];
    if (fiber.started) _longjmp(fiber.at, 1);
    start(fiber);
}

// If all lanes that one of the waiting ones waits for are there: combines, and lets them go on.
void complete_collective(int warp) {
    Fiber* const first = fibers + warp * kLanes;
    for (uint32_t left = in_collective[warp]; left;) {
        const Fiber& one = first[__builtin_ctz(left)];
        left &= left - 1;
        const uint32_t mask = one.mask & ~exited[warp];
        if ((in_collective[warp] & mask) != mask) continue;
        void* payload[kLanes] = {};
        bool same = true;
        for (int l = 0; l < kLanes; ++l)
            if (mask >> l & 1) payload[l] = first[l].payload, same = same && first[l].mask == one.mask;
        if (!same) continue;
        one.combine(payload);
        for (int l = 0; l < kLanes; ++l)
            if (mask >> l & 1) first[l].state = State::Ready;
        in_collective[warp] &= ~mask;
        left &= ~mask;
    }
}

void release_barrier() {
    int counted = 0;
    for (int t = 0; t < threads; ++t) {
        if (fibers[t].where != fibers[0].where || fibers[t].line != fibers[0].line)
            fail("waits at the barrier %s:%d, but thread %d at %s:%d", fibers[current].where, fibers[current].line,
                 t ? t : current, fibers[t].where, fibers[t].line);
        counted += fibers[t].predicate;
    }
    for (int t = 0; t < threads; ++t) fibers[t].state = State::Ready, fibers[t].counted = counted;
    waiting = 0;
    end_of_barrier();
}

void release_named(int id) {
    Named& barrier = named[id];
    for (int t = 0; t < threads; ++t) {
        if (barrier.came[t] != barrier.came[t / kLanes * kLanes])
            fail("barrier %d completes with some lanes of warp %d", id, t / kLanes);
        if (barrier.came[t] == Named::Waits) fibers[t].state = State::Ready;
    }
    const bool all = barrier.count == threads;
    barrier = Named{};
    if (all) end_of_named_barrier(id);
}

std::string waits(const Fiber& fiber) {
    if (fiber.state == State::Exited) return "have exited";
    if (fiber.state == State::Named)
        return "wait at barrier " + std::to_string(fiber.id) + ", " + fiber.where + ":" + std::to_string(fiber.line);
    if (fiber.state == State::Barrier) return std::string("wait at ") + fiber.where + ":" + std::to_string(fiber.line);
    return std::string("wait in ") + fiber.where;
}

// No fiber can go on: tells where they are.
void report_deadlock() {
    std::string text = "deadlock:";
    for (int t = 0; t < threads;) {
        int end = t + 1;
        while (end < threads && waits(fibers[end]) == waits(fibers[t])) ++end;
        text += " threads " + std::to_string(t) + " to " + std::to_string(end - 1) + " " + waits(fibers[t]) + ";";
        t = end;
    }
    set_position(0);
    fail("%s", text.c_str());
}

// The indices 0 to n - 1 in the order of the schedule.
void arrange(std::vector<int>& indices, int n) {
    indices.resize(n);
    std::iota(indices.begin(), indices.end(), 0);
    if (order == Highest) std::reverse(indices.begin(), indices.end());
    if (order == Shuffled) std::shuffle(indices.begin(), indices.end(), random_);
}

// Runs the lanes of a warp until none can go on, or, shuffled, for a few turns, so that warps interleave.
bool run_warp(int warp) {
    static std::vector<int> lanes;
    bool progress = false;
    for (int turns = order == Shuffled ? 1 + random_() % 4 : 1 << 30; turns > 0; --turns) {
        bool moved = false;
        arrange(lanes, std::min(kLanes, threads - warp * kLanes));
        for (size_t l = 0; l < lanes.size(); ++l) {
            const int thread = warp * kLanes + lanes[l];
            if (fibers[thread].state != State::Ready) continue;
            resume(thread);
            moved = progress = true;
        }
        after_run_of_lanes();
        if (!moved) break;
    }
    return progress;
}

void run_block() {
    if (shared_memory_) shared_memory_->poison();
    for (auto& one : shared_arrays) one.second->poison();
    for (int t = 0; t < threads; ++t) {
        fibers[t].state = State::Ready;
        fibers[t].copies.pending.clear();
        fibers[t].copies.commits = 0;
    }
    waiting = 0;
    for (Named& barrier : named) barrier = Named{};
    start_of_block(threads);
    const int count = (threads + kLanes - 1) / kLanes;
    for (int warp = 0; warp < count; ++warp) {
        const int lanes = std::min(kLanes, threads - warp * kLanes);
        in_collective[warp] = 0;
        exited[warp] = lanes == kLanes ? 0 : ~0u << lanes;  // those that do not exist count as such
    }
    static std::vector<int> warps;
    while (!std::all_of(exited, exited + count, [](uint32_t lanes) { return lanes == ~0u; })) {
        bool progress = false;
        arrange(warps, count);
        for (size_t w = 0; w < warps.size(); ++w) progress = run_warp(warps[w]) || progress;
        if (!progress) report_deadlock();
    }
    end_of_block();
    for (int id = 1; id < kBarriers; ++id)
        if (named[id].count) fail("the block ends with %d arrivals left over at barrier %d", named[id].count, id);
    if (shared_memory_ && !shared_memory_->intact()) fail("the block wrote beside its dynamic shared memory");
    for (auto& one : shared_arrays)
        if (!one.second->intact()) fail("the block wrote beside a static shared array");
}

bool refuse(const std::string& why) {
    snprintf(message_, sizeof message_, "launch refused: %s", why.c_str());
    return false;
}

}  // namespace

void fail(const char* format, ...) {
    int used = snprintf(message_, sizeof message_, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y,
                        blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message_ + used, sizeof message_ - used, format, arguments);
    va_end(arguments);
    siglongjmp(aborted, 1);
}

const char* message() { return message_; }

int thread() { return current; }

int lane() { return current % kLanes; }

Copies& copies() { return fibers[current].copies; }

int barrier(bool predicate, const char* file, int line) {
    Fiber& fiber = fibers[current];
    fiber.state = State::Barrier;
    fiber.where = file;
    fiber.line = line;
    fiber.predicate = predicate;
    if (++waiting == threads)
        release_barrier();
    else
        switch_to_scheduler();
    return fiber.counted;
}

void named_barrier(int id, int count, bool waits, const char* file, int line) {
    if (id < 1 || id >= kBarriers) fail("named barrier %d: there are 1 to %d", id, kBarriers - 1);
    if (count % kLanes || count > threads) fail("barrier %d of %d threads, of %d in the block", id, count, threads);
    Named& barrier = named[id];
    if (barrier.count && barrier.needed != count)
        fail("barrier %d of %d threads, to which others came as one of %d", id, count, barrier.needed);
    if (barrier.came[current]) fail("comes to barrier %d twice before it is complete", id);
    barrier.needed = count;
    barrier.came[current] = waits ? Named::Waits : Named::Arrived;
    comes_to_named_barrier(id);
    Fiber& fiber = fibers[current];
    if (waits) fiber.state = State::Named, fiber.id = id, fiber.where = file, fiber.line = line;
    if (++barrier.count == count)
        release_named(id);
    else if (waits)
        switch_to_scheduler();
}

void collective(uint32_t mask, Combine combine, void* payload, const char* name) {
    if (!(mask >> lane() & 1)) fail("%s with mask 0x%08x, which leaves out its own lane", name, mask);
    Fiber& fiber = fibers[current];
    const int warp = current / kLanes;
    if (const uint32_t others = in_collective[warp] & mask) {  // these agree with each other already
        const int other = __builtin_ctz(others);
        const Fiber& one = fibers[warp * kLanes + other];
        if ((one.mask >> lane() & 1) && (one.mask != mask || one.combine != combine))
            fail("%s with mask 0x%08x, but lane %d is in %s with 0x%08x", name, mask, other, one.where, one.mask);
    }
    fiber.state = State::Collective;
    in_collective[warp] |= 1u << lane();
    fiber.where = name;
    fiber.mask = mask;
    fiber.combine = combine;
    fiber.payload = payload;
    if (const uint32_t all = mask & ~exited[warp]; (in_collective[warp] & all) == all) complete_collective(warp);
    if (fiber.state == State::Collective) switch_to_scheduler();
}

void* shared_array(const void* site, size_t bytes, size_t alignment) {
    auto& array = shared_arrays[site];
    if (!array) {
        array = std::make_unique<Guarded>(bytes, alignment, true);
        array->poison();
        size_t total = 0;
        for (auto& one : shared_arrays) total += one.second->bytes();
        if (total > kStaticSharedLimit) fail("%zu bytes of static shared memory: at most 48 KiB", total);
        total += shared_memory_bytes();
        // from half of the 48 KiB on, launch() asks for what the device allows (cuda/device.h)
        const size_t most = shared_memory_bytes() > kStaticSharedLimit / 2 ? shared_limit : kStaticSharedLimit;
        if (total > most) fail("%zu bytes of shared memory, of which the block may have %zu", total, most);
    }
    return array->data();
}

void* shared_memory() { return shared_memory_->data(); }

size_t shared_memory_bytes() { return shared_memory_->bytes(); }

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u)
        return refuse("a grid of no blocks, or of too many");
    if (!block.x || !block.y || !block.z || block.z > 64 || block.x * block.y * block.z > kMaxThreads)
        return refuse("a block of no threads, or of more than 1024");
    if (shared_bytes > shared_limit)
        return refuse(std::to_string(shared_bytes) + " bytes of shared memory, of which a block may have " +
                      std::to_string(shared_limit));
    if (!stacks) {
        void* all = mmap(nullptr, kMaxThreads * (kStack + kStackGuard), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks = static_cast<unsigned char*>(all);
        for (int t = 0; t < kMaxThreads; ++t) mprotect(stacks + t * (kStack + kStackGuard), kStackGuard, PROT_NONE);
    }
    FaultHandlers handlers;
    const TrackedLaunch tracked;
    gridDim = grid;
    blockDim = block;
    threads = static_cast<int>(block.x * block.y * block.z);
    kernel_ = &kernel;
    shared_arrays.clear();
    shared_memory_ = std::make_unique<Guarded>(shared_bytes, 128, true);
    const unsigned blocks = grid.x * grid.y * grid.z;
    static unsigned b;  // survives the jump
    if (sigsetjmp(aborted, 1) == 0) {
        for (b = 0; b < blocks; ++b) {
            const unsigned at = order == Highest ? blocks - 1 - b : b;
            blockIdx = {at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y)};
            run_block();
        }
        return true;
    }
    for (Fiber& fiber : fibers) fiber.started = fiber.started && fiber.state == State::Exited;  // the rest is lost
    return false;
}

}  // namespace emulator

// For tests: the order of the fibers, 0 lowest first, 1 highest first, 2 shuffled with a seed.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_schedule(int order, unsigned seed) {
    emulator::order = static_cast<emulator::Order>(order);
    emulator::random_.seed(seed);
}
