// All code compiled for an instruction set lives in a namespace of its own. Otherwise the linker would keep one
// copy of each inline function for all, and an old processor might run AVX-512 code.
#pragma once

#ifndef QNK_ISA
#define QNK_ISA baseline
#endif

namespace qnk {
inline namespace QNK_ISA {}
}
