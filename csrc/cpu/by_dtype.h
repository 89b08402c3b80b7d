// From dtype codes of the C ABI to template arguments.
#pragma once

#include "common/dtype.h"
#include "qnkernels.h"

namespace qnk {
inline namespace QNK_ISA {

// body(T*) with T the storage type of `dtype`; QNK_BAD_DTYPE for an unknown code.
template <typename Body>
int by_dtype(int dtype, const Body& body) {
    switch (dtype) {
        case QNK_F32: return body(static_cast<float*>(nullptr));
        case QNK_BF16: return body(static_cast<bf16*>(nullptr));
        case QNK_F16: return body(static_cast<f16*>(nullptr));
        default: return QNK_BAD_DTYPE;
    }
}

template <typename Body>
int by_dtypes(int first, int second, const Body& body) {
    return by_dtype(first, [&](auto* a) { return by_dtype(second, [&](auto* b) { return body(a, b); }); });
}

}  // namespace QNK_ISA
}  // namespace qnk
