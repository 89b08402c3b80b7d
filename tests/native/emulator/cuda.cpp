#include "cuda.h"

namespace {
int processors = 3;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = processors;
    return cudaSuccess;
}

// For tests: multiprocessors of the device, which launchers may ask for.
extern "C" __attribute__((visibility("default"))) void qnk_emulator_processors(int count) { processors = count; }
