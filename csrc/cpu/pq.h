// The weight that the kernels of product-quantized layers read.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "cpu/buffer.h"

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

}  // namespace QNK_ISA
}  // namespace qnk
