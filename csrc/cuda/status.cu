#include "cuda/status.h"

#include <atomic>

namespace qnk {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
std::atomic<int> use{1};
}  // namespace

int wgmma_use() { return use; }

int cuda_status(cudaError_t error) {
    if (error == cudaSuccess) return QNK_OK;
    last_error = error;
    return QNK_CUDA_ERROR;
}

}  // namespace qnk

const char* qnk_cuda_last_error(void) { return cudaGetErrorString(qnk::last_error); }

int qnk_cuda_device_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int qnk_cuda_use_wgmma(int use) { return qnk::use.exchange(use); }
