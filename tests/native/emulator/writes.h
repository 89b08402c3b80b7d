// Arrays of which a launch may write each element once: a second write fails, though it be of the same value.
//
// During a launch their pages are read-only. The first write of a thread faults, and opens them until the lanes of its
// warp have had their turn. What a thread has changed, from one switch of fibers to the next, is noted and taken out of
// sight again: the poison comes back, until the launch ends. So each thread shows all that it writes, but for several
// writes of an element in one run, and those of the poison itself.
// Elements that are not poison as the launch starts are left alone: zeros to which kernels add, what a launch before
// this one wrote.
#pragma once

#include <stddef.h>

namespace emulator {

class Guarded;

void track(const Guarded& array, size_t element_bytes, const char* name);
void forget(const Guarded& array);

// While it lives, the arrays are tracked; then they hold what was written.
class TrackedLaunch {
public:
    TrackedLaunch();
    ~TrackedLaunch();
    TrackedLaunch(const TrackedLaunch&) = delete;
    TrackedLaunch& operator=(const TrackedLaunch&) = delete;
};

// Hooks of the scheduler.
void after_run_of_thread();
void after_run_of_lanes();
// Of a fault: whether it is a write to a tracked array, which may be done now.
bool is_first_write(const void* address);

}  // namespace emulator
