#include "launches.h"

#include <dlfcn.h>
#include <stdint.h>

#include <vector>

namespace {

struct Launch {
    uint64_t kernel;  // offset in the library
    uint32_t grid[3], threads;
    uint64_t shared_bytes;
};
std::vector<Launch> launches;

}  // namespace

void emulator::note_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    Dl_info library{};
    dladdr(kernel, &library);
    const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    launches.push_back({offset, {grid.x, grid.y, grid.z}, block.x * block.y * block.z, shared_bytes});
}

// For tests: the launches since the last call of qnk_emulator_forget_launches, oldest first.
extern "C" __attribute__((visibility("default"))) const void* qnk_emulator_launches(size_t* count) {
    *count = launches.size();
    return launches.data();
}
extern "C" __attribute__((visibility("default"))) void qnk_emulator_forget_launches() { launches.clear(); }
