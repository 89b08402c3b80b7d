// Packed integer weights: codes of a row side by side, low bits first.
#pragma once

#include "common/philox.h"

namespace qnk {
inline namespace QNK_ISA {

// Code i of a row whose codes take `bits` (4 or 8) each.
QNK_HD uint32_t unpack_code(const uint8_t* row, int64_t i, int bits) {
    if (bits == 8) return row[i];
    return (row[i >> 1] >> (4 * (i & 1))) & 15u;
}

}  // namespace QNK_ISA
}  // namespace qnk
