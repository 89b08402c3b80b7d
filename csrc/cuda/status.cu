#include "cuda/status.h"

#include <atomic>

namespace qnk {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
std::atomic<bool> allowed{true};
}  // namespace

bool wgmma_allowed() { return allowed; }

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

int qnk_cuda_allow_wgmma(int allow) { return qnk::allowed.exchange(allow != 0); }
