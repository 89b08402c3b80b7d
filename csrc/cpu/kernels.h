// The kernels of one instruction set: functions of the C ABI, less their prefix, in namespace qnk::<isa>.
#pragma once

#include "qnkernels.h"

#define QNK_CPU_KERNELS(X)                                                                             \
    X(minmax)                                                                                          \
    X(histogram_range)                                                                                 \
    X(quantization_parameters)                                                                         \
    X(fake_quantize)                                                                                   \
    X(fake_quantize_backward)                                                                          \
    X(dynamic_fake_quantize)                                                                           \
    X(moving_fake_quantize)                                                                            \
    X(low_precision_operands)                                                                          \
    X(stop_gradient)                                                                                   \
    X(block_noise)                                                                                     \
    X(block_noise_centroid)                                                                            \
    X(int_linear)                                                                                      \
    X(int_linear_quantized)                                                                            \
    X(int_linear_backward)                                                                             \
    X(int_embedding)                                                                                   \
    X(int_decode)                                                                                      \
    X(kmeans_assign)                                                                                   \
    X(kmeans_update)                                                                                   \
    X(kmeans_step)                                                                                     \
    X(kmeans_bounded_step)                                                                             \
    X(pq_linear)                                                                                       \
    X(pq_linear_backward)                                                                              \
    X(pq_embedding)

#define QNK_DECLARE_KERNEL(name) decltype(qnk_cpu_##name) name;
