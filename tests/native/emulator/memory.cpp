#include "memory.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <set>

#include "writes.h"

namespace emulator {
namespace {

constexpr size_t kPage = 4096, kGuard = 16 * kPage;
constexpr unsigned char kCanary = 0xff;  // poison, too: what reads it gets NaN

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

std::set<const Guarded*>& arrays() {
    static auto* all = new std::set<const Guarded*>;  // never destroyed: arrays of other files outlive this one
    return *all;
}

}  // namespace

Guarded::Guarded(size_t bytes, size_t alignment, bool at_end) : bytes_(bytes) {
    accessible_ = up(bytes + 2 * alignment + 64, kPage);
    void* all = mmap(nullptr, accessible_ + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pages_ = static_cast<unsigned char*>(all) + kGuard;
    mprotect(pages_, accessible_, PROT_READ | PROT_WRITE);
    memset(pages_, kCanary, accessible_);
    size_t start = at_end ? (accessible_ - bytes) / alignment * alignment : 0;
    if (alignment < 64 && start % (2 * alignment) == 0) start += at_end ? -alignment : alignment;
    data_ = pages_ + start;
    arrays().insert(this);
}

Guarded::~Guarded() {
    arrays().erase(this);
    munmap(pages_ - kGuard, accessible_ + 2 * kGuard);
}

void Guarded::poison() { memset(data_, kPoison, bytes_); }

bool Guarded::intact() const {
    for (const unsigned char* p = pages_; p < data_; ++p)
        if (*p != kCanary) return false;
    for (const unsigned char* p = data_ + bytes_; p < pages_ + accessible_; ++p)
        if (*p != kCanary) return false;
    return true;
}

bool Guarded::holds(const void* address) const {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= pages_ && at < pages_ + accessible_;
}

void Guarded::allow_writes(bool allowed) const {
    mprotect(pages_, accessible_, allowed ? PROT_READ | PROT_WRITE : PROT_READ);
}

const char* locate(const void* address) {
    static char text[160];
    const intptr_t at = reinterpret_cast<intptr_t>(address);
    const Guarded* nearest = nullptr;
    intptr_t distance = 0;  // before the start if negative, else from the end on
    for (const Guarded* one : arrays()) {
        const intptr_t start = reinterpret_cast<intptr_t>(one->data());
        const intptr_t end = start + static_cast<intptr_t>(one->bytes());
        const intptr_t from = at < start ? at - start : at - end;
        const auto size = [](intptr_t v) { return v < 0 ? -v : v; };
        if (!nearest || size(from) < size(distance)) nearest = one, distance = from;
    }
    if (!nearest || distance > (1 << 24) || distance < -(1 << 24))
        snprintf(text, sizeof text, "far from any array");
    else if (distance < 0)
        snprintf(text, sizeof text, "%td bytes before an array of %zu bytes", -distance, nearest->bytes());
    else
        snprintf(text, sizeof text, "%td bytes past the end of an array of %zu bytes", distance, nearest->bytes());
    return text;
}

}  // namespace emulator

// For tests: arrays that a kernel is called with. free returns whether its surroundings are as they were.
namespace {
std::map<void*, std::unique_ptr<emulator::Guarded>> allocated;
}

extern "C" __attribute__((visibility("default"))) void* qnk_emulator_allocate(size_t bytes, size_t alignment,
                                                                             int at_end) {
    auto array = std::make_unique<emulator::Guarded>(bytes, alignment, at_end != 0);
    void* data = array->data();
    allocated[data] = std::move(array);
    return data;
}

extern "C" __attribute__((visibility("default"))) int qnk_emulator_free(void* data) {
    const auto found = allocated.find(data);
    const bool intact = found->second->intact();
    emulator::forget(*found->second);
    allocated.erase(found);
    return intact;
}

// Elements of the array, of `size` bytes each, may be written once in a launch. Messages call it `name`.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_track(void* data, size_t size, const char* name) {
    emulator::track(*allocated.at(data), size, name);
}
