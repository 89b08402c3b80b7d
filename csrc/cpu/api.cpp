// The C ABI of the CPU library: each call goes to the kernel of the active instruction set.
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qnk {
namespace portable {
QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)
}
#if defined(QNK_X86)
namespace avx2 {
QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)
}
namespace avx512 {
QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)
}
namespace amx {
QNK_CPU_KERNELS(QNK_DECLARE_KERNEL)
}
#endif

namespace {

struct Table {
#define QNK_MEMBER(name) decltype(&qnk_cpu_##name) name;
    QNK_CPU_KERNELS(QNK_MEMBER)
};

const Table& table() {
#define QNK_ENTRY_portable(name) &portable::name,
#define QNK_ENTRY_avx2(name) &avx2::name,
#define QNK_ENTRY_avx512(name) &avx512::name,
#define QNK_ENTRY_amx(name) &amx::name,
    static const Table tables[] = {
        {QNK_CPU_KERNELS(QNK_ENTRY_portable)},
#if defined(QNK_X86)
        {QNK_CPU_KERNELS(QNK_ENTRY_avx2)},
        {QNK_CPU_KERNELS(QNK_ENTRY_avx512)},
        {QNK_CPU_KERNELS(QNK_ENTRY_amx)},
#endif
    };
    return tables[static_cast<int>(active_isa())];
}

}  // namespace
}  // namespace qnk

using qnk::table;

const char* qnk_cpu_isa(void) { return qnk::isa_name(qnk::active_isa()); }

const char* qnk_cpu_isa_detected(void) { return qnk::isa_name(qnk::detect_isa()); }

int qnk_cpu_threads(void) { return qnk::max_threads(); }

int qnk_cpu_has_openmp(void) { return qnk::has_openmp(); }

int qnk_cpu_minmax(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner, float* low,
                   float* high) {
    return table().minmax(x, dtype, outer, channels, inner, low, high);
}

int qnk_cpu_histogram_range(const void* x, int dtype, int64_t outer, int64_t channels, int64_t inner,
                            const int64_t* bits, float* low, float* high) {
    return table().histogram_range(x, dtype, outer, channels, inner, bits, low, high);
}

int qnk_cpu_quantization_parameters(const float* low, const float* high, int64_t n, const int64_t* bits,
                                    int symmetric, float* scale, float* zero_point) {
    return table().quantization_parameters(low, high, n, bits, symmetric, scale, zero_point);
}

int qnk_cpu_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n, const float* scale,
                          const float* zero_point, int64_t channels, int64_t inner, const int64_t* bits,
                          int32_t threshold, const int64_t* seed, uint8_t* outside) {
    return table().fake_quantize(x, x_dtype, y, y_dtype, n, scale, zero_point, channels, inner, bits, threshold,
                                 seed, outside);
}

int qnk_cpu_fake_quantize_backward(const void* grad, int grad_dtype, const void* x, void* grad_x, int x_dtype,
                                   int64_t n, const float* scale, const float* zero_point, int64_t channels,
                                   int64_t inner, const int64_t* bits, int32_t threshold,
                                   const int64_t* seed, const uint8_t* outside) {
    return table().fake_quantize_backward(grad, grad_dtype, x, grad_x, x_dtype, n, scale, zero_point, channels,
                                          inner, bits, threshold, seed, outside);
}

int qnk_cpu_dynamic_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t samples, int64_t inner,
                                  const int64_t* bits, int stochastic, const int64_t* seed) {
    return table().dynamic_fake_quantize(x, x_dtype, y, y_dtype, samples, inner, bits, stochastic, seed);
}

int qnk_cpu_moving_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t outer, int64_t channels,
                                 int64_t inner, const int64_t* bits, float momentum, float* low, float* high,
                                 int64_t* step, float* scale, float* zero_point) {
    return table().moving_fake_quantize(x, x_dtype, y, y_dtype, outer, channels, inner, bits, momentum, low, high, step,
                                        scale, zero_point);
}

int qnk_cpu_low_precision_operands(const void* x, int dtype, int64_t n, const void* weight, int weight_dtype,
                                   int64_t rows, int64_t columns, const int64_t* bits, float momentum, int moves,
                                   float* low, float* high, int64_t* step, void* x_out, uint8_t* outside,
                                   void* weight_out) {
    return table().low_precision_operands(x, dtype, n, weight, weight_dtype, rows, columns, bits, momentum, moves, low,
                                          high, step, x_out, outside, weight_out);
}

int qnk_cpu_stop_gradient(void* grad, int dtype, int64_t n, const uint8_t* outside) {
    return table().stop_gradient(grad, dtype, n, outside);
}

int qnk_cpu_block_noise(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                        int64_t block_size, int kind, float factor, int32_t threshold, const int64_t* seed) {
    return table().block_noise(weight, weight_dtype, out, out_dtype, n_blocks, block_size, kind, factor,
                               threshold, seed);
}

int qnk_cpu_block_noise_centroid(const void* weight, int weight_dtype, void* out, int out_dtype, int64_t n_blocks,
                                 int64_t block_size, const float* codebook, int64_t k, int32_t threshold,
                                 const int64_t* seed) {
    return table().block_noise_centroid(weight, weight_dtype, out, out_dtype, n_blocks, block_size, codebook, k,
                                        threshold, seed);
}

int qnk_cpu_int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale,
                       const uint8_t* zero_point, const float* bias, void* y, int64_t m, int64_t n, int64_t k,
                       int64_t groups, int bits) {
    return table().int_linear(x, dtype, weight, scale, zero_point, bias, y, m, n, k, groups, bits);
}

int qnk_cpu_int_linear_quantized(const void* x, int dtype, const float* x_scale, const float* x_zero_point,
                                 const uint8_t* weight, const float* scale, const uint8_t* zero_point,
                                 const float* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t groups,
                                 int bits) {
    return table().int_linear_quantized(x, dtype, x_scale, x_zero_point, weight, scale, zero_point, bias, y, m, n, k,
                                        groups, bits);
}

int qnk_cpu_int_linear_backward(const void* grad, int dtype, const uint8_t* weight, const float* scale,
                                const uint8_t* zero_point, void* grad_x, int64_t m, int64_t n, int64_t k,
                                int64_t groups, int bits) {
    return table().int_linear_backward(grad, dtype, weight, scale, zero_point, grad_x, m, n, k, groups, bits);
}

int qnk_cpu_int_embedding(const int64_t* indices, int64_t count, const uint8_t* weight, const float* scale,
                          const uint8_t* zero_point, void* out, int out_dtype, int64_t rows, int64_t k,
                          int64_t groups, int bits) {
    return table().int_embedding(indices, count, weight, scale, zero_point, out, out_dtype, rows, k, groups,
                                 bits);
}

int qnk_cpu_int_decode(const uint8_t* weight, const float* scale, const uint8_t* zero_point, void* out, int out_dtype,
                       int64_t n, int64_t k, int64_t groups, int bits, int64_t first, int64_t last) {
    return table().int_decode(weight, scale, zero_point, out, out_dtype, n, k, groups, bits, first, last);
}

int qnk_cpu_kmeans_assign(const float* points, int64_t n, int64_t d, const float* centroids, int64_t k,
                          int32_t* codes, float* distances) {
    return table().kmeans_assign(points, n, d, centroids, k, codes, distances);
}

int qnk_cpu_kmeans_update(const float* points, const int32_t* codes, const float* weights, int64_t n, int64_t d,
                          int64_t k, int exponent, int weight_exponent, int64_t* sums, int64_t* mass) {
    return table().kmeans_update(points, codes, weights, n, d, k, exponent, weight_exponent, sums, mass);
}

int qnk_cpu_kmeans_step(const float* points, const float* weights, int64_t n, int64_t d, const float* centroids,
                        int64_t k, int exponent, int weight_exponent, int objective_exponent, int32_t* codes,
                        int64_t* sums, int64_t* mass, int64_t* objective) {
    return table().kmeans_step(points, weights, n, d, centroids, k, exponent, weight_exponent, objective_exponent,
                               codes, sums, mass, objective);
}

int qnk_cpu_kmeans_bounded_step(const float* points, const float* weights, int64_t n, int64_t d, const float* centroids,
                                int64_t k, const int32_t* group_of, int64_t groups, const float* travelled, float unit,
                                int exponent, int weight_exponent, int objective_exponent, int32_t* codes,
                                uint16_t* bounds, int64_t* sums, int64_t* mass, int64_t* objective, int64_t* looks) {
    return table().kmeans_bounded_step(points, weights, n, d, centroids, k, group_of, groups, travelled, unit, exponent,
                                       weight_exponent, objective_exponent, codes, bounds, sums, mass, objective, looks);
}

int qnk_cpu_pq_linear(const void* x, int dtype, const void* codes, int code_bytes, const float* codebook,
                      const float* bias, void* y, int64_t m, int64_t n, int64_t blocks, int64_t k, int64_t d) {
    return table().pq_linear(x, dtype, codes, code_bytes, codebook, bias, y, m, n, blocks, k, d);
}

int qnk_cpu_pq_linear_backward(const void* grad, const void* x, int dtype, const void* codes, int code_bytes,
                               const float* codebook, int mean, void* grad_x, float* grad_codebook, int64_t m, int64_t n,
                               int64_t blocks, int64_t k, int64_t d) {
    return table().pq_linear_backward(grad, x, dtype, codes, code_bytes, codebook, mean, grad_x, grad_codebook, m, n,
                                      blocks, k, d);
}

int qnk_cpu_pq_embedding(const int64_t* indices, int64_t count, const void* codes, int code_bytes, int64_t row_stride,
                         int64_t block_stride, const float* codebook, void* out, int out_dtype, int64_t rows,
                         int64_t blocks, int64_t d) {
    return table().pq_embedding(indices, count, codes, code_bytes, row_stride, block_stride, codebook, out, out_dtype,
                                rows, blocks, d);
}
