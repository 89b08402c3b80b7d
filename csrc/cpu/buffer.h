// Work memory of a kernel.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "common/isa_namespace.h"

namespace qnk {
inline namespace QNK_ISA {

// `count` values of T, aligned to 64 bytes, or null without memory.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        data_ = static_cast<T*>(aligned_alloc(64, bytes));
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data_); }

    explicit operator bool() const { return data_ != nullptr; }
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace QNK_ISA
}  // namespace qnk
