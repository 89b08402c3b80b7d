// Which instruction set the kernels run with.
#pragma once

namespace qnk {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

const char* isa_name(Isa isa);
Isa detect_isa();  // the best this processor and its operating system support
bool has_bf16_products();  // vdpbf16ps, which not all with AVX-512 have
Isa active_isa();  // the same, lowered by QNKERNELS_ISA; decided once

}  // namespace qnk
