#include "writes.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr size_t kUnit = 2;  // bytes that are looked at together, at most: larger elements may be moved half by half
constexpr unsigned char kUnwritten[kUnit] = {kPoison, kPoison};

struct Writer {
    enum Kind : int { Nobody = -1, Before = -2 };  // Before: not poison when the launch started
    unsigned block;
    int thread;
};

struct Tracked {
    const Guarded* array;
    size_t element, unit;  // bytes
    std::string name;
    bool open = false;                    // it may be written now
    std::vector<unsigned char> shown{};   // what the array holds between the runs of threads
    std::vector<unsigned char> values{};  // what it will hold at the end
    std::vector<Writer> writers{};        // of units
};

std::vector<Tracked> all;
bool launched = false;

uint3 position(unsigned index, const dim3& of) {
    return {index % of.x, index / of.x % of.y, index / (of.x * of.y)};
}

// The thread that runs has changed the unit at byte `at`.
void note(Tracked& one, size_t at) {
    unsigned char* const now = one.array->data() + at;
    memcpy(&one.values[at], now, one.unit);
    Writer& writer = one.writers[at / one.unit];
    if (writer.thread >= 0) {
        const uint3 block = position(writer.block, gridDim);
        const uint3 by = position(static_cast<unsigned>(writer.thread), blockDim);
        fail("writes element %zu of %s, which block (%u, %u, %u), thread (%u, %u, %u) has written", at / one.element,
             one.name.c_str(), block.x, block.y, block.z, by.x, by.y, by.z);
    }
    if (writer.thread == Writer::Before) {
        memcpy(&one.shown[at], now, one.unit);
    } else {
        writer = {(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x, thread()};
        memcpy(now, kUnwritten, one.unit);
    }
}

// Chunks that have not changed are passed over.
void note_changes(Tracked& one) {
    constexpr size_t kChunk = 512;  // bytes
    const unsigned char* const now = one.array->data();
    for (size_t at = 0; at < one.shown.size(); at += kChunk) {
        const size_t end = std::min(at + kChunk, one.shown.size());
        if (memcmp(now + at, &one.shown[at], end - at) == 0) continue;
        for (size_t i = at; i < end; i += one.unit)
            if (memcmp(now + i, &one.shown[i], one.unit) != 0) note(one, i);
    }
}

}  // namespace

void track(const Guarded& array, size_t element_bytes, const char* name) {
    all.push_back({&array, element_bytes, std::min(element_bytes, kUnit), name});
}

void forget(const Guarded& array) {
    const auto is_of = [&](const Tracked& one) { return one.array == &array; };
    all.erase(std::remove_if(all.begin(), all.end(), is_of), all.end());
}

TrackedLaunch::TrackedLaunch() {
    launched = true;
    for (Tracked& one : all) {
        const unsigned char* const data = one.array->data();
        one.values.assign(data, data + one.array->bytes());
        one.shown = one.values;
        one.writers.clear();
        for (size_t at = 0; at < one.shown.size(); at += one.unit)
            one.writers.push_back({0, memcmp(data + at, kUnwritten, one.unit) ? Writer::Before : Writer::Nobody});
        one.open = false;
        one.array->allow_writes(false);
    }
}

TrackedLaunch::~TrackedLaunch() {
    launched = false;
    for (Tracked& one : all) {
        one.array->allow_writes(true);
        memcpy(one.array->data(), one.values.data(), one.values.size());
    }
}

void after_run_of_thread() {
    for (Tracked& one : all)
        if (one.open) note_changes(one);
}

void after_run_of_lanes() {
    for (Tracked& one : all) {
        if (one.open) one.array->allow_writes(false);
        one.open = false;
    }
}

bool is_first_write(const void* address) {
    if (!launched) return false;
    for (Tracked& one : all) {
        if (one.open || !one.array->holds(address)) continue;
        one.array->allow_writes(true);
        return one.open = true;
    }
    return false;
}

}  // namespace emulator
