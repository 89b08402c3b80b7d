// Turning CUDA's errors into statuses of the C ABI.
#pragma once

#include "cuda/device.h"
#include "qnkernels.h"

namespace qnk {

// QNK_OK, or QNK_CUDA_ERROR with the error kept for qnk_cuda_last_error of this thread.
int cuda_status(cudaError_t error);

}  // namespace qnk
