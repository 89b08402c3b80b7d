// What has been launched, for tests that ask which form of a kernel served a case.
#pragma once

#include <stddef.h>

#include "scheduler.h"

namespace emulator {

void note_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes);

}  // namespace emulator
