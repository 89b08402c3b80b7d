// Arrays between pages that may not be touched: an access beyond either end faults, or meets a canary.
#pragma once

#include <stddef.h>

namespace emulator {

constexpr int kPoison = 0xff;  // NaN in every float type, -1 in every integer

class Guarded {
public:
    // alignment: a power of two; the array starts at a multiple of it, and, if it is less than 64, of no more.
    // at_end: it ends where the pages do, but for less than two times `alignment`; otherwise it starts with them.
    Guarded(size_t bytes, size_t alignment, bool at_end);
    ~Guarded();
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    unsigned char* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    void poison();
    bool intact() const;  // what surrounds the array on its pages is as it was
    bool holds(const void* address) const;  // on its pages
    void allow_writes(bool allowed) const;

private:
    unsigned char* pages_;  // the first that may be touched
    size_t accessible_;     // bytes
    unsigned char* data_;
    size_t bytes_;
};

// Where an address lies with respect to the nearest array ("12 bytes past the end of an array of 40 bytes").
const char* locate(const void* address);

}  // namespace emulator
