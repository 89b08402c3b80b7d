// Scalar quantization noise, one pass: y = (clamp(round(x / s + z), 0, 2^bits - 1) - z) * s where noised.
//
// A thread owns 8 consecutive elements: one Philox call, 16-byte loads and stores. Floor: bytes of x plus bytes
// of y over the copy bandwidth; about 250 instructions a thread, 31 an element.
#include "common/affine.h"
#include "cuda/device.h"
#include "cuda/status.h"

namespace qnk {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads * kDrawsPerCall == kOutsideTile, "a block is a tile");

template <typename T>
struct alignas(sizeof(T) * kDrawsPerCall) Pack {  // at most 32 bytes: two 16-byte accesses
    T value[kDrawsPerCall];
};

struct Arguments {
    int64_t n;
    const float* scale;       // [channels]
    const float* zero_point;  // [channels]
    int64_t channels, inner;  // element i has parameter (i / inner) % channels
    const int64_t* bits;      // 0-d
    const int64_t* seed;      // 0-d
    uint32_t threshold;       // 0 to 65536
    uint8_t* outside;         // [blocks], or null
};

// Aligned: x and y allow whole-pack accesses. Shared: the 8 elements of a thread have one scale.
template <typename In, typename Out, bool Aligned, bool Shared>
__global__ void __launch_bounds__(kThreads) fake_quantize_kernel(const In* __restrict__ x, Out* __restrict__ y,
                                                                 Arguments a) {
    const int64_t call = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t first = call * kDrawsPerCall;
    const int64_t rest = first < a.n ? a.n - first : 0;  // 0: nothing but the barrier is left to do
    const int count = rest < kDrawsPerCall ? static_cast<int>(rest) : kDrawsPerCall;

    Pack<In> in;
    if (Aligned && count == kDrawsPerCall) {
        in = *reinterpret_cast<const Pack<In>*>(x + first);
    } else {
#pragma unroll
        for (int j = 0; j < kDrawsPerCall; ++j) in.value[j] = j < count ? x[first + j] : from_float<In>(0.0f);
    }
    const float top = top_code(*a.bits);
    const uint32_t noised = a.threshold == 0        ? 0u
                            : a.threshold >= 65536u ? 0xffu
                                                    : noise_bits(call, *a.seed, a.threshold);
    int64_t channel = first / a.inner % a.channels;
    int64_t left = a.inner - first % a.inner;  // elements before the next scale
    float s = a.scale[channel], z = a.zero_point[channel];

    Pack<Out> out;
    bool outside = false;
#pragma unroll
    for (int j = 0; j < kDrawsPerCall; ++j) {
        if (!Shared && left-- == 0) {
            channel = channel + 1 == a.channels ? 0 : channel + 1;
            s = a.scale[channel];
            z = a.zero_point[channel];
            left = a.inner - 1;
        }
        const float value = to_float(in.value[j]);
        outside |= j < count && (value < (0.0f - z) * s || value > (top - z) * s);
        out.value[j] = from_float<Out>((noised >> j) & 1u ? fake_quantize_value(value, s, z, top) : value);
    }
    if (Aligned && count == kDrawsPerCall) {
        *reinterpret_cast<Pack<Out>*>(y + first) = out;
    } else {
#pragma unroll
        for (int j = 0; j < kDrawsPerCall; ++j)
            if (j < count) y[first + j] = out.value[j];
    }
    if (a.outside) {
        const int any = __syncthreads_or(outside);
        if (threadIdx.x == 0) a.outside[blockIdx.x] = any != 0;
    }
}

template <typename In, typename Out>
int launch_kernel(const void* x, void* y, const Arguments& a, cudaStream_t stream) {
    const In* in = static_cast<const In*>(x);
    Out* out = static_cast<Out*>(y);
    const bool aligned = reinterpret_cast<uintptr_t>(x) % alignof(Pack<In>) == 0 &&
                         reinterpret_cast<uintptr_t>(y) % alignof(Pack<Out>) == 0;
    const bool shared = a.channels == 1 || a.inner % kDrawsPerCall == 0;
    const int64_t calls = (a.n + kDrawsPerCall - 1) / kDrawsPerCall;
    const unsigned blocks = static_cast<unsigned>((calls + kThreads - 1) / kThreads);
    if (blocks == 0) return QNK_OK;
    const auto kernel = aligned && shared ? fake_quantize_kernel<In, Out, true, true>
                        : aligned         ? fake_quantize_kernel<In, Out, true, false>
                                          : fake_quantize_kernel<In, Out, false, false>;
    return cuda_status(launch(kernel, blocks, kThreads, 0, stream, in, out, a));
}

template <typename In>
int launch_to(int y_dtype, const void* x, void* y, const Arguments& a, cudaStream_t stream) {
    switch (y_dtype) {
        case QNK_F32: return launch_kernel<In, float>(x, y, a, stream);
        case QNK_BF16: return launch_kernel<In, bf16>(x, y, a, stream);
        case QNK_F16: return launch_kernel<In, f16>(x, y, a, stream);
        default: return QNK_BAD_DTYPE;
    }
}

}  // namespace
}  // namespace qnk

int qnk_cuda_fake_quantize(const void* x, int x_dtype, void* y, int y_dtype, int64_t n, const float* scale,
                           const float* zero_point, int64_t channels, int64_t inner, const int64_t* bits,
                           int32_t threshold, const int64_t* seed, uint8_t* outside, void* stream) {
    const qnk::Arguments a{n,    scale, zero_point, channels, inner > 0 ? inner : 1, bits, seed,
                           static_cast<uint32_t>(threshold), outside};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (x_dtype) {
        case QNK_F32: return qnk::launch_to<float>(y_dtype, x, y, a, on);
        case QNK_BF16: return qnk::launch_to<qnk::bf16>(y_dtype, x, y, a, on);
        case QNK_F16: return qnk::launch_to<qnk::f16>(y_dtype, x, y, a, on);
        default: return QNK_BAD_DTYPE;
    }
}
