// The C ABI of qnkernels: plain pointers, sizes and, on a GPU, a stream. No torch, and no Python but for the three functions
// that say so.
//
// Shapes and layouts stand beside each argument; all arrays are contiguous. Functions return a qnk_status.
// dtype arguments are qnk_dtype values. `seed` and `bits` are read through pointers, so that they may change
// between replays of a captured graph; on a GPU they point to device memory.
//
// Elements share a scale by (channels, inner): element i has parameter (i / inner) % channels.
//   per tensor: channels = 1, inner = n;  along an axis: inner = product of later dimensions;
//   per group of a row: channels = n / group_size, inner = group_size.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define QNK_API __declspec(dllexport)
#else
#define QNK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum qnk_status {
    QNK_OK = 0,
    QNK_BAD_BITS = 1,    // bits outside [2, 16], or not 4 or 8 where packed
    QNK_BAD_DTYPE = 2,   // not a qnk_dtype
    QNK_BAD_INDEX = 3,   // an index outside the table
    QNK_NO_MEMORY = 4,   // a work buffer could not be allocated
    QNK_CUDA_ERROR = 5,  // see qnk_cuda_last_error
};

enum qnk_dtype { QNK_F32 = 0, QNK_BF16 = 1, QNK_F16 = 2 };

enum qnk_noise_kind { QNK_ZERO = 0, QNK_MEAN = 1 };

// ---- CPU library ----

// Instruction set in use, and the best one that this processor has: "portable", "avx2", "avx512" or "amx".
// QNKERNELS_ISA in the environment lowers the first; it is read at the first call of any kernel.
QNK_API const char* qnk_cpu_isa(void);
QNK_API const char* qnk_cpu_isa_detected(void);
// Threads the next kernel may use, and whether an OpenMP runtime was found in the process.
QNK_API int qnk_cpu_threads(void);
QNK_API int qnk_cpu_has_openmp(void);

// low, high [channels] <- smallest and largest of x [outer, channels, inner]; NaN propagates.
QNK_API int qnk_cpu_minmax(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                           float* low, float* high);

// low, high [channels] <- clipping range of least squared error on a 2048-bin histogram of x.
QNK_API int qnk_cpu_histogram_range(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                                    const int64_t* bits, float* low, float* high);

// scale, zero_point [n] <- those of the 2^bits quantizer over each [low, high], widened to hold 0. A range of
// width 0 gives scale 1. symmetric: zero point 2^(bits - 1), and -high and high fit.
QNK_API int qnk_cpu_quantization_parameters(const float* low, const float* high, int64_t n,
                                            const int64_t* bits, int symmetric, float* scale,
                                            float* zero_point);

// y [n] <- quantization noise on x [n]: noised where the draw of (seed, i) < threshold (0 to 65536; philox.h).
// outside [ceil(n / 2048)], or null <- 1 for each 2048 elements of which any lies outside the quantizer's range, 0 for
// the others.
QNK_API int qnk_cpu_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n,
                                  const float* scale, const float* zero_point, int64_t channels,
                                  int64_t inner, const int64_t* bits, int32_t threshold, const int64_t* seed,
                                  uint8_t* outside);

// grad_x [n] <- straight-through gradient, in the dtype of x. grad_x may be grad, with the same dtype: then
// only what is stopped is written. outside: as the forward gave it, or null; where it is 0, x is not read.
QNK_API int qnk_cpu_fake_quantize_backward(const void* grad, int grad_dtype, const void* x, void* grad_x,
                                           int x_dtype, int64_t n, const float* scale,
                                           const float* zero_point, int64_t channels, int64_t inner,
                                           const int64_t* bits, int32_t threshold, const int64_t* seed,
                                           const uint8_t* outside);

// y [samples, inner] <- each sample of x at the levels of the quantizer over its own range, widened to hold 0:
// the nearest one, or (stochastic) one of the two next to it, chosen by the draw of (seed, i).
QNK_API int qnk_cpu_dynamic_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t samples,
                                          int64_t inner, const int64_t* bits, int stochastic, const int64_t* seed);

// low, high [channels] are moved by momentum towards the range of x [outer, channels, inner] (replaced where *step
// is 0), *step counts on, and y <- x at the levels of the quantizer over them: scale, zero_point [channels].
QNK_API int qnk_cpu_moving_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t outer,
                                         int64_t channels, int64_t inner, const int64_t* bits, float momentum,
                                         float* low, float* high, int64_t* step, float* scale, float* zero_point);

// Weight and input of a layer in low precision. x_out [n] <- x at the levels of the quantizer over (*low, *high), which
// are moved by momentum towards the range of x first, and *step counts on, where `moves`; where *step is 0 the range is
// that of x. outside [(n + 7) / 8] <- which x lie outside the levels, bit i % 8 of byte i / 8. weight_out <- each row of
// weight [rows, columns] at the levels over its own range. Both results have the dtype of x.
QNK_API int qnk_cpu_low_precision_operands(const void* x, int dtype, int64_t n, const void* weight, int weight_dtype,
                                           int64_t rows, int64_t columns, const int64_t* bits, float momentum,
                                           int moves, float* low, float* high, int64_t* step, void* x_out,
                                           uint8_t* outside, void* weight_out);

// grad [n] <- 0 where the bit of `outside` is set.
QNK_API int qnk_cpu_stop_gradient(void* grad, int dtype, int64_t n, const uint8_t* outside);

// out [n_blocks, block_size] <- proxy noise on weight; kept blocks are multiplied by factor (QNK_ZERO).
QNK_API int qnk_cpu_block_noise(const void* weight, int weight_dtype, void* out, int out_dtype,
                                int64_t n_blocks, int64_t block_size, int kind, float factor,
                                int32_t threshold, const int64_t* seed);

// The same with the nearest of codebook [k, block_size] in place of each noised block. block_size up to 64.
QNK_API int qnk_cpu_block_noise_centroid(const void* weight, int weight_dtype, void* out, int out_dtype,
                                         int64_t n_blocks, int64_t block_size, const float* codebook, int64_t k,
                                         int32_t threshold, const int64_t* seed);

// y [m, n] <- x [m, k] @ ((q - z) * s)^T + bias [n]. weight: packed codes [n, k * bits / 8], low bits first;
// scale, zero_point [n, groups]; zero_point may be null (z = 2^(bits - 1)), bias may be null.
QNK_API int qnk_cpu_int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale,
                               const uint8_t* zero_point, const float* bias, void* y, int64_t m, int64_t n,
                               int64_t k, int64_t groups, int bits);

// The same with x in 8-bit codes: of the quantizer x_scale, x_zero_point (one value each), or, where they are null, of
// each row's range. y = (sum over groups of fp32(exact sum) * scale) * x scale + bias.
QNK_API int qnk_cpu_int_linear_quantized(const void* x, int dtype, const float* x_scale, const float* x_zero_point,
                                         const uint8_t* weight, const float* scale, const uint8_t* zero_point,
                                         const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t groups,
                                         int bits);

// The two above as functions for Python, which take the arguments of the op and return y, or None for what they do not
// serve; new references, with the interpreter's lock held. Before, qnk_cpu_tensors takes the table of torch.Tensor's
// __dlpack_c_exchange_api__ and a tuple of what they need of Python (tensors.cpp), and returns whether that serves.
QNK_API int qnk_cpu_tensors(const void* table, void* objects);
QNK_API void* qnk_cpu_int_linear_function(void);
QNK_API void* qnk_cpu_int_linear_quantized_function(void);

// grad_x [m, k] <- grad [m, n] @ ((q - z) * s).
QNK_API int qnk_cpu_int_linear_backward(const void* grad, int dtype, const uint8_t* weight,
                                        const float* scale, const uint8_t* zero_point, void* grad_x,
                                        int64_t m, int64_t n, int64_t k, int64_t groups, int bits);

// out [count, k] <- decoded rows indices [count] of the table weight [rows, k * bits / 8].
QNK_API int qnk_cpu_int_embedding(const int64_t* indices, int64_t count, const uint8_t* weight,
                                  const float* scale, const uint8_t* zero_point, void* out, int out_dtype,
                                  int64_t rows, int64_t k, int64_t groups, int bits);

// out [n, last - first] <- columns first to last of the decoded weight [n, k * bits / 8].
QNK_API int qnk_cpu_int_decode(const uint8_t* weight, const float* scale, const uint8_t* zero_point, void* out,
                               int out_dtype, int64_t n, int64_t k, int64_t groups, int bits, int64_t first,
                               int64_t last);

// codes, distances [n] <- index of the nearest of centroids [k, d], the lowest among equals, and the squared distance to
// it, of points [n, d]. d up to 64.
QNK_API int qnk_cpu_kmeans_assign(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k,
                                  int32_t* codes, float* distances);

// sums [k, d], mass [k] <- sums of (weight *) points by code in units of 2^-exponent, and of weights in units of
// 2^-weight_exponent. weights [n] may be null: mass then counts.
QNK_API int qnk_cpu_kmeans_update(const float* points, const int32_t* codes, const float* weights, int64_t n,
                                  int64_t d, int64_t k, int exponent, int weight_exponent, int64_t* sums,
                                  int64_t* mass);

// Both at once; objective <- sum of (weight *) squared distances in units of 2^-objective_exponent.
QNK_API int qnk_cpu_kmeans_step(const float* points, const float* weights, int64_t n, int64_t d,
                                const float* centroids, int64_t k, int exponent, int weight_exponent,
                                int objective_exponent, int32_t* codes, int64_t* sums, int64_t* mass,
                                int64_t* objective);

// The same from codes, sums and mass of these points with other centroids, which become those with these centroids.
// group_of [k]: the group, of `groups` (16, 32, 48 or 64), that a centroid is in. bounds [n, groups]: 0, or as earlier calls
// with these groups and this unit > 0 left them. travelled [groups]: what the farthest moving centroid of a group has moved
// since the bounds were 0, summed over the steps. looks <- how many pairs of point and group were looked at.
QNK_API int qnk_cpu_kmeans_bounded_step(const float* points, const float* weights, int64_t n, int64_t d,
                                        const float* centroids, int64_t k, const int32_t* group_of, int64_t groups,
                                        const float* travelled, float unit, int exponent, int weight_exponent,
                                        int objective_exponent, int32_t* codes, uint16_t* bounds, int64_t* sums,
                                        int64_t* mass, int64_t* objective, int64_t* looks);

// y [m, n] <- x [m, blocks * d] @ W^T + bias [n], block b of row o of W being codebook [k, d] at codes [blocks, n].
// code_bytes 1 or 2; codes below k. bias may be null.
QNK_API int qnk_cpu_pq_linear(const void* x, int dtype, const void* codes, int code_bytes, const float* codebook,
                              const float* bias, void* y, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d);

// grad_x [m, blocks * d], in the dtype of x, and grad_codebook [k, d], the sum (or mean) over the blocks of each codeword,
// of the same layer; either may be null.
QNK_API int qnk_cpu_pq_linear_backward(const void* grad, const void* x, int dtype, const void* codes, int code_bytes,
                                       const float* codebook, int mean, void* grad_x, float* grad_codebook, int64_t m, int64_t n,
                                       int64_t blocks, int64_t k, int64_t d);

// out [count, blocks * d] <- decoded rows indices [count], or all in order (null), of codes with the given strides.
QNK_API int qnk_cpu_pq_embedding(const int64_t* indices, int64_t count, const void* codes, int code_bytes,
                                 int64_t row_stride, int64_t block_stride, const float* codebook, void* out,
                                 int out_dtype, int64_t rows, int64_t blocks, int64_t d);

// ---- CUDA library: pointers to device memory, stream is a cudaStream_t, nothing waits ----

QNK_API const char* qnk_cuda_last_error(void);
QNK_API int qnk_cuda_device_count(void);
// For tests and benchmarks, on devices of compute capability 9.0: 0: no kernels with wgmma, 1 (at the start): where they
// are expected to be the fastest, 2: wherever they can serve. For launches of the process from then on; returns what
// it was.
QNK_API int qnk_cuda_use_wgmma(int use);

QNK_API int qnk_cuda_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n,
                                   const float* scale, const float* zero_point, int64_t channels,
                                   int64_t inner, const int64_t* bits, int32_t threshold, const int64_t* seed,
                                   uint8_t* outside, void* stream);

// As qnk_cpu_int_linear; bias of bias_dtype. zero_point below 2^bits. Where the number of parts below is not 1, the sums
// are taken in so many parts, which need workspace fp32 [parts, m, n].
QNK_API int qnk_cuda_int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale,
                                const uint8_t* zero_point, const void* bias, int bias_dtype, void* y,
                                float* workspace, int64_t m, int64_t n, int64_t k, int64_t groups, int bits,
                                void* stream);
QNK_API int qnk_cuda_int_linear_parts(int dtype, int64_t m, int64_t n, int64_t k, int64_t groups, int bits);

// out [n, k] <- the decoded weight [n, k * bits / 8], rounded to fp32 and then to out_dtype. zero_point may be null.
QNK_API int qnk_cuda_int_decode(const uint8_t* weight, const float* scale, const uint8_t* zero_point, void* out,
                                int out_dtype, int64_t n, int64_t k, int64_t groups, int bits, void* stream);

// As qnk_cpu_pq_linear, with codebook [k, d] in the dtype of x; d a multiple of 4, arrays 16-byte aligned. Codes past
// the codebook read its last codeword. Where the number of parts below is not 1, the sums are taken in so many parts,
// which need workspace fp32 [parts, m, n].
QNK_API int qnk_cuda_pq_linear(const void* x, int dtype, const void* codes, int code_bytes, const void* codebook,
                               const float* bias, void* y, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d,
                               float* workspace, void* stream);
QNK_API int qnk_cuda_pq_linear_parts(int dtype, int code_bytes, int64_t m, int64_t n, int64_t blocks, int64_t k,
                                     int64_t d);

// grad_x [m, blocks * d], in the dtype of x; sums [k, d] += round(gradient of W * 2^exponent) over the blocks of each
// codeword, and counts [k] += those blocks. Each may be null, counts and exponent where sums is. m, n, blocks >= 1.
QNK_API int qnk_cuda_pq_linear_backward(const void* grad, const void* x, int dtype, const void* codes, int code_bytes,
                                        const void* codebook, void* grad_x, int64_t* sums, int64_t* counts,
                                        const int64_t* exponent, int64_t m, int64_t n, int64_t blocks, int64_t k,
                                        int64_t d, void* stream);

// out [count, blocks * d] <- rows first to first + count - 1 of the decoded weight: codes [blocks, n], codebook [k, d] in
// dtype, that of out. Any d; codes past the codebook read its last codeword. first is a multiple of 16; out and codebook
// are 16-byte aligned, and codes where a row of them is whole units of 16 bytes.
QNK_API int qnk_cuda_pq_decode(const void* codes, int code_bytes, const void* codebook, int dtype, void* out, int64_t n,
                               int64_t blocks, int64_t k, int64_t d, int64_t first, int64_t count, void* stream);

// As on the CPU, but codes outside [0, k) are left out of sums. work: kmeans_work_bytes, for the kernels alone.
QNK_API int qnk_cuda_kmeans_work_bytes(int64_t d, int64_t k);
QNK_API int qnk_cuda_kmeans_assign(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k,
                                   void* work, int32_t* codes, float* distances, void* stream);
QNK_API int qnk_cuda_kmeans_update(const float* points, const int32_t* codes, const float* weights, int64_t n,
                                   int64_t d, int64_t k, int exponent, int weight_exponent, int64_t* sums,
                                   int64_t* mass, void* stream);
QNK_API int qnk_cuda_kmeans_step(const float* points, const float* weights, int64_t n, int64_t d,
                                 const float* centroids, int64_t k, int exponent, int weight_exponent,
                                 int objective_exponent, void* work, int32_t* codes, int64_t* sums, int64_t* mass,
                                 int64_t* objective, void* stream);

#ifdef __cplusplus
}
#endif
