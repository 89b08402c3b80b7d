#include "cpu/isa.h"

#include <stdlib.h>
#include <string.h>

#if defined(QNK_X86)
#include <cpuid.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace qnk {

const char* isa_name(Isa isa) {
    static const char* const names[] = {"portable", "avx2", "avx512", "amx"};
    return names[static_cast<int>(isa)];
}

#if defined(QNK_X86)
namespace {

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

unsigned long long enabled_state() {  // XCR0: which registers the operating system saves
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux hands out the 8 KiB tile registers on request only.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

Isa detect_isa() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
    const bool fma = bit(c, 12), os_saves = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!os_saves || !avx || !fma || !f16c) return Isa::portable;
    const unsigned long long state = enabled_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::portable;
    const bool bmi1 = bit(b, 3), avx2 = bit(b, 5), bmi2 = bit(b, 8);
    if (!bmi1 || !avx2 || !bmi2) return Isa::portable;
    const bool f = bit(b, 16), dq = bit(b, 17), bw = bit(b, 30), vl = bit(b, 31);
    const bool vbmi = bit(c, 1), vnni = bit(c, 11);
    if (!f || !dq || !bw || !vl || !vbmi || !vnni || (state & 0xe0) != 0xe0) return Isa::avx2;
    const bool gfni = bit(c, 8), amx_bf16 = bit(d, 22), amx_tile = bit(d, 24), amx_int8 = bit(d, 25);
    if (!gfni || !amx_bf16 || !amx_tile || !amx_int8 || !has_bf16_products() || (state & 0x60000) != 0x60000)
        return Isa::avx512;
    return request_tiles() ? Isa::amx : Isa::avx512;
}

bool has_bf16_products() {
    static const bool has = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    }();
    return has;
}
#else
Isa detect_isa() { return Isa::portable; }
bool has_bf16_products() { return false; }
#endif

Isa active_isa() {
    static const Isa isa = [] {
        const Isa best = detect_isa();
        const char* wanted = getenv("QNKERNELS_ISA");
        for (int i = 0; wanted && i < static_cast<int>(best); ++i)
            if (strcmp(wanted, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
        return best;
    }();
    return isa;
}

}  // namespace qnk
