// Signals of a kernel that does what it may not: out of bounds, misaligned, undefined.
#pragma once

#include <signal.h>

namespace emulator {

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

// While it lives, faults end the launch by fail(), with the offset of the instruction in the library: [+0x...].
class FaultHandlers {
public:
    FaultHandlers();
    ~FaultHandlers();
    FaultHandlers(const FaultHandlers&) = delete;
    FaultHandlers& operator=(const FaultHandlers&) = delete;

private:
    struct sigaction old_[sizeof kFaults / sizeof *kFaults];
    stack_t old_stack_;
};

}  // namespace emulator
