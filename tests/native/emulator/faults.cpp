#include "faults.h"

#include <dlfcn.h>
#include <stdint.h>
#include <ucontext.h>

#include <iterator>
#include <vector>

#include "memory.h"
#include "scheduler.h"
#include "writes.h"

namespace emulator {
namespace {

void on_fault(int signal, siginfo_t* info, void* context) {
    if (signal == SIGSEGV && is_first_write(info->si_addr)) return;  // it is tried again
    uintptr_t pc = 0;
#if defined(__x86_64__)
    pc = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    pc = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
    Dl_info library{};
    dladdr(reinterpret_cast<void*>(pc), &library);
    const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(library.dli_fbase);
    const char* what = signal == SIGSEGV || signal == SIGBUS ? locate(info->si_addr)
                       : signal == SIGFPE                    ? "integer division by zero"
                                                             : "misaligned access or undefined behaviour";
    fail("%s [+0x%zx]", what, static_cast<size_t>(offset));
}

}  // namespace

FaultHandlers::FaultHandlers() {
    static std::vector<unsigned char> alternate(64 * 1024);  // as that of a fiber may be what is full
    stack_t stack{};
    stack.ss_sp = alternate.data();
    stack.ss_size = alternate.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &action, &old_[i]);
}

FaultHandlers::~FaultHandlers() {
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
}

}  // namespace emulator
