// What the kernels of product-quantized layers share: the weight they read, and work buffers.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "common/dtype.h"

namespace qnk {
inline namespace QNK_ISA {

// Block b of row o of the weight [n, blocks * d] is codebook[code(b, o)].
struct ProductQuantized {
    const void* codes;  // [blocks, n], of code_bytes each
    int code_bytes;
    const float* codebook;  // [k, d]
    int64_t n, blocks, k;
    int d;

    bool valid() const { return code_bytes == 1 || code_bytes == 2; }
    int64_t columns() const { return blocks * d; }

    template <typename Code>
    const Code* block(int64_t b) const {
        return static_cast<const Code*>(codes) + b * n;
    }
};

// body(Code*) with Code the type of the codes.
template <typename Body>
inline auto by_code(const ProductQuantized& w, const Body& body) {
    if (w.code_bytes == 1) return body(static_cast<const uint8_t*>(nullptr));
    return body(static_cast<const uint16_t*>(nullptr));
}

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
