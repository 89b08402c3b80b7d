// y = x @ ((q - z) * s)^T + bias over packed 8-bit and 4-bit codes, which are decoded as they are read.
//
// Four kernels: up to 16 rows of x wait for the weight (few), more of them for the tensor cores (tiles, by mma.sync;
// from 17 rows of 16-bit x on, warpgroups, by wgmma, on a device of compute capability 9.0 where groups are whole
// steps of 64 columns), and rows or groups that no 16-byte load fits take one code at a time (general). plan_for
// chooses. Sums in fp32; parts of a sum, where columns are split between blocks, are added in a fixed order: the same
// bits in every run.
//
// Floors on an H100 (3.35 TB/s, 990 TFLOP/s) for n = k = 4096, and what was predicted, in us. What an H200 measured is in
// bench/bench_int_linear.py: the tensor-core kernels took 1.5 to 2.5 times as long, so that from 256 rows on weights are
// decoded for cuBLAS instead (cuda_dense.py).
//   bytes: int8 16.8 MB = 5.0, int4 in groups of 128 with zero points 9.0 MB = 2.7;  operations: 0.034 a row of x
//   m = 1: int8 7, int4 4.5 (80 % of the bandwidth and a start of 1 us)
//   m = 16: int8 8, int4 6.5 (64 tiles of outputs read x from the L2 cache, 8.4 MB; sums of 4 parts)
//   m = 64: 10 (34 MB from the L2 cache, sums of 4 parts)
//   tiles, m = 128: 13, m = 1024: 75 (35 by the operations, of which mma.sync reaches about 60 %)
//   warpgroups, m = 128: 11 (50 MB from the L2 cache at 5.5 TB/s = 9, sums of 4 parts), m = 256: 18, m = 1024: 65
//   int8, 58 int4 (400 and 335 MB from the L2 cache = 73 and 61 at 5.5 TB/s, 57 and 48 at 7)
//   where groups are of 128 columns, of which tensor cores wait 10 % for sums to be taken over: 1.1 times as much
// Registers, shared memory and blocks of a multiprocessor on sm_90a, bf16 or f16, int8 / int4, by outputs of a block:
//   few, 16: 86 / 92 (by groups 112 / 119), 16 / 32 KiB, 4;  32: 124 / 118 (128), 32 / 64 KiB, 2;  64: 202 / 208 (251
//   / 254), 64 / 128 KiB (64 with four warps, for devices of less), 1
//   tiles, 64 rows: 126 / 126, 64 / 48 KiB, 2;  128 rows: 254 / 244, 96 / 80 KiB, 1
//   warpgroups: 234 / 217, 65 KiB, 1
#include "cuda/int_linear.h"

#include <algorithm>

#include "cuda/int_linear_few.h"
#include "cuda/int_linear_general.h"
#include "cuda/int_linear_tiles.h"
#include "cuda/int_linear_warpgroups.h"
#include "cuda/status.h"

namespace qnk {
namespace {

constexpr int kFewBlocks = 2, kTileBlocks = 1;  // of a multiprocessor, to be filled by splitting columns
constexpr int64_t kLeastTurns = 2;              // of a part: less is not worth a sum

// Cuts `turns` of a loop into parts where less than three quarters of the multiprocessors have a block.
Plan split(Plan plan, int64_t blocks, int blocks_each, int64_t turns) {
    const int64_t all = processors();
    if (4 * blocks < 3 * all) plan.parts = std::min(blocks_each * all / blocks, turns / kLeastTurns);
    plan.turns = ceil_div(turns, std::max<int64_t>(plan.parts, 1));
    plan.parts = ceil_div(turns, plan.turns);
    return plan;
}

// Steps of a turn and warps of a block of the few-rows kernel: enough of the weight on its way, by one block or several.
constexpr int few_run(int outputs) { return outputs == 16 ? 4 : outputs == 32 ? 2 : 1; }
constexpr int kFewSharedOfAll = 99 * 1024;  // bytes that a block may have on every device: that of 8.6 and 8.9

// Four warps where eight would need more shared memory than the device has for a block: 128 KiB, for codes of 4 bits
// and x of 16 bits in 9 to 16 rows, or of fp32. (Not measured: no device of that kind was at hand.)
int few_warps(int64_t blocks, int outputs, int rows, int bits, int x_size) {
    if (outputs == 16 && blocks >= 3 * processors()) return 4;
    return few_shared(x_size, bits, rows / 8, outputs, 8) <= shared_memory_limit() ? 8 : 4;
}

// aligned: x and weight start at multiples of 16 bytes.
Plan plan_for(int64_t m, int64_t n, int64_t k, int64_t groups, int bits, size_t x_size, bool aligned) {
    if (k == 0) return {Kernel::General, 0, 0, 1, 1};
    const int64_t group = groups == 1 ? 0 : k / groups, few_step = 512 / bits;
    const bool whole = k * bits / 8 % 16 == 0 && k * static_cast<int64_t>(x_size) % 16 == 0;
    if (!aligned || !whole || group % kUnit != 0) return {Kernel::General, 0, 0, 1, 1};
    if (m <= kFewRows && group % few_step == 0 && k < 1 << 28) {
        // more outputs to a block where x is larger, as every block reads all of x
        const int outputs = m <= 2 ? 16 : m <= 8 || x_size == 4 ? 32 : 64, rows = m <= 8 ? 8 : 16;
        const int64_t blocks = ceil_div(n, outputs);
        const Plan plan{Kernel::Few, outputs, rows, 1, 1,
                        few_warps(blocks, outputs, rows, bits, static_cast<int>(x_size))};
        return split(plan, blocks, kFewBlocks, ceil_div(k, few_run(outputs) * few_step * plan.warps));
    }
    if (m >= kWarpgroupRows && x_size == 2 && group % 64 == 0 && has_wgmma()) {
        const Plan plan{Kernel::Warpgroups, 128, 128, 1, 1};
        return split(plan, ceil_div(m, plan.rows) * ceil_div(n, plan.outputs), kTileBlocks, ceil_div(k, 64));
    }
    const Plan plan{Kernel::Tiles, 128, m <= 64 || x_size == 4 ? 64 : 128, 1, 1};
    return split(plan, ceil_div(m, plan.rows) * ceil_div(n, plan.outputs), kTileBlocks, ceil_div(k, 64));
}

template <typename T, int Bits, int Rows, int Outputs, int Warps>
cudaError_t launch_few(const Plan& plan, const IntLinear& a, cudaStream_t stream) {
    constexpr int kRun = few_run(Outputs);
    using F = Few<T, Bits, Rows / 8, Outputs / 16, kRun, Warps>;
    const dim3 grid(static_cast<unsigned>(ceil_div(a.n, Outputs)), static_cast<unsigned>(plan.parts));
    const auto kernel = a.groups > 1 ? int_linear_few_kernel<T, Bits, Rows / 8, Outputs / 16, kRun, Warps, true>
                                     : int_linear_few_kernel<T, Bits, Rows / 8, Outputs / 16, kRun, Warps, false>;
    return launch(kernel, grid, F::kThreads, F::kShared, stream, a);
}

// Blocks of 16 outputs have a form of four warps for devices that are full; others where eight do not fit all devices.
template <typename T, int Bits, int Rows, int Outputs>
cudaError_t launch_few(const Plan& plan, const IntLinear& a, cudaStream_t stream) {
    static_assert(few_shared(sizeof(T), Bits, Rows / 8, Outputs, 4) <= kFewSharedOfAll, "");
    if constexpr (Outputs == 16 || few_shared(sizeof(T), Bits, Rows / 8, Outputs, 8) > kFewSharedOfAll)
        if (plan.warps == 4) return launch_few<T, Bits, Rows, Outputs, 4>(plan, a, stream);
    return launch_few<T, Bits, Rows, Outputs, 8>(plan, a, stream);
}

template <typename T, int Bits, int WarpRows>
cudaError_t launch_tiles(const Plan& plan, const IntLinear& a, cudaStream_t stream) {
    using S = Tiles<T, Bits, WarpRows>;
    const int64_t blocks = ceil_div(a.m, S::kRows) * ceil_div(a.n, S::kOutputs);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.parts));
    return launch(int_linear_tiles_kernel<T, Bits, WarpRows>, grid, S::kThreads, S::kShared, stream, a);
}

template <typename T, int Bits>
cudaError_t launch_warpgroups(const Plan& plan, const IntLinear& a, cudaStream_t stream) {
    using S = Warpgroups<T, Bits>;
    const int64_t blocks = ceil_div(a.m, S::kRows) * ceil_div(a.n, S::kOutputs);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(plan.parts));
    return launch(int_linear_warpgroups_kernel<T, Bits>, grid, S::kThreads, S::kShared, stream, a);
}

template <typename T, int Bits>
cudaError_t launch_general(const IntLinear& a, cudaStream_t stream) {
    const int64_t blocks = ceil_div(a.m, kGeneralRows) * ceil_div(a.n, kGeneralWarps);
    return launch(int_linear_general_kernel<T, Bits>, static_cast<unsigned>(blocks), 32 * kGeneralWarps, 0, stream, a);
}

template <typename T, int Bits>
cudaError_t launch_plan(const Plan& plan, const IntLinear& a, cudaStream_t stream) {
    if (plan.kernel == Kernel::General) return launch_general<T, Bits>(a, stream);
    constexpr bool kPieces = sizeof(T) == 4;  // for fp32, in three pieces, registers are too few for the larger blocks
    if constexpr (!kPieces)
        if (plan.kernel == Kernel::Warpgroups) return launch_warpgroups<T, Bits>(plan, a, stream);
    if (plan.kernel == Kernel::Tiles)
        return plan.rows == 64 ? launch_tiles<T, Bits, 1>(plan, a, stream)
                               : launch_tiles<T, Bits, kPieces ? 1 : 2>(plan, a, stream);
    if (plan.rows == 16) return launch_few<T, Bits, 16, kPieces ? 32 : 64>(plan, a, stream);
    return plan.outputs == 32 ? launch_few<T, Bits, 8, 32>(plan, a, stream)
                              : launch_few<T, Bits, 8, 16>(plan, a, stream);
}

template <typename T>
int int_linear(IntLinear a, int bits, float* workspace, cudaStream_t stream) {
    const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
    const Plan plan = plan_for(a.m, a.n, a.k, a.groups, bits, sizeof(T), aligned);
    a.partial = plan.parts > 1 ? workspace : nullptr;
    a.turns = plan.turns;
    cudaError_t error = bits == 4 ? launch_plan<T, 4>(plan, a, stream) : launch_plan<T, 8>(plan, a, stream);
    if (error == cudaSuccess && plan.parts > 1)
        error = launch(int_linear_sum_kernel<T>, static_cast<unsigned>(ceil_div(a.m * a.n, 256)), 256, 0, stream, a,
                       plan.parts);
    return cuda_status(error);
}

size_t size_of(int dtype) { return dtype == QNK_F32 ? 4 : 2; }

}  // namespace
}  // namespace qnk

int qnk_cuda_int_linear_parts(int dtype, int64_t m, int64_t n, int64_t k, int64_t groups, int bits) {
    if (m == 0 || n == 0) return 1;
    return static_cast<int>(qnk::plan_for(m, n, k, groups, bits, qnk::size_of(dtype), true).parts);
}

int qnk_cuda_int_linear(const void* x, int dtype, const uint8_t* weight, const float* scale, const uint8_t* zero_point,
                        const void* bias, int bias_dtype, void* y, float* workspace, int64_t m, int64_t n, int64_t k,
                        int64_t groups, int bits, void* stream) {
    if (bits != 4 && bits != 8) return QNK_BAD_BITS;
    if (m == 0 || n == 0) return QNK_OK;
    const qnk::IntLinear a{x, weight, scale, zero_point, bias, bias_dtype, y, nullptr, m, n, k, groups, 1};
    cudaStream_t on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case QNK_F32: return qnk::int_linear<float>(a, bits, workspace, on);
        case QNK_BF16: return qnk::int_linear<qnk::bf16>(a, bits, workspace, on);
        case QNK_F16: return qnk::int_linear<qnk::f16>(a, bits, workspace, on);
        default: return QNK_BAD_DTYPE;
    }
}
