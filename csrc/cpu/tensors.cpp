// Kernels by tensors as the Python objects that they are. To look at their shapes one by one and to hand over twelve
// numbers takes Python longer than a small layer takes to compute.
//
// Called with the interpreter's lock held, which is given up while a kernel runs. What is not in the plainest form
// (dtypes, shapes, devices, order in memory) is not served and left to the caller, who says what is wrong with it or
// brings it into that form.
#include "common/dtype.h"
#include "cpu/buffer.h"
#include "cpu/dlpack.h"
#include "qnkernels.h"

extern "C" {
__attribute__((weak)) void* PyEval_SaveThread(void);
__attribute__((weak)) void PyEval_RestoreThread(void* state);
__attribute__((weak)) void PyErr_Clear(void);
}

namespace qnk {
namespace {

const DlExchange* exchange = nullptr;
void* none = nullptr;  // None

// A contiguous tensor of the processor.
class View {
  public:
    // Null where there is None, false where there is anything else.
    bool of(void* object) {
        given_ = object != none;
        if (!given_) return true;
        if (exchange->view(object, &tensor_) != 0) {
            PyErr_Clear();
            return false;
        }
        if (tensor_.device_type != kDlCpu || tensor_.lanes != 1) return false;
        int64_t step = 1;
        for (int32_t i = tensor_.dims; i-- > 0; step *= tensor_.shape[i])
            if (tensor_.shape[i] != 1 && tensor_.strides[i] != step) return false;
        count_ = step;
        return count_ > 0;
    }

    bool given() const { return given_; }
    int32_t dims() const { return tensor_.dims; }
    int64_t size(int32_t dim) const { return tensor_.shape[dim]; }
    int64_t last() const { return tensor_.dims ? tensor_.shape[tensor_.dims - 1] : 0; }
    int64_t count() const { return count_; }
    bool is(uint8_t code, uint8_t bits) const { return tensor_.code == code && tensor_.bits == bits; }
    bool fp32() const { return is(kDlFloat, 32); }
    int dtype() const {
        return fp32() ? QNK_F32 : is(kDlBfloat, 16) ? QNK_BF16 : is(kDlFloat, 16) ? QNK_F16 : -1;
    }
    template <typename T>
    T* data() const {
        return given_ ? reinterpret_cast<T*>(static_cast<uint8_t*>(tensor_.data) + tensor_.byte_offset) : nullptr;
    }

  private:
    DlTensor tensor_;
    bool given_ = false;
    int64_t count_ = 0;
};

// The arguments of a layer over a packed weight, as qnk_cpu_int_linear has them.
struct Layer {
    View x, weight, scale, zero_point, bias, y;
    int64_t m, n, k, groups;

    bool take(void* const (&tensors)[6], int bits) {
        View* views[] = {&x, &weight, &scale, &zero_point, &bias, &y};
        for (int i = 0; i < 6; ++i)
            if (!views[i]->of(tensors[i])) return false;
        if ((bits != 4 && bits != 8) || !x.given() || !weight.given() || !scale.given() || !y.given()) return false;
        if (!weight.is(kDlUnsigned, 8) || weight.dims() != 2 || !scale.fp32() || scale.dims() != 2) return false;
        n = weight.size(0);
        k = weight.size(1) * 8 / bits;
        groups = scale.size(1);
        if (scale.size(0) != n || k % groups) return false;
        if (zero_point.given() && (!zero_point.is(kDlUnsigned, 8) || zero_point.dims() != 2 || zero_point.size(0) != n ||
                                   zero_point.size(1) != groups))
            return false;
        if (x.dtype() < 0 || x.last() != k || y.dtype() != x.dtype()) return false;
        m = x.count() / k;
        if (y.count() != m * n) return false;
        return !bias.given() || (bias.dims() == 1 && bias.size(0) == n && (bias.fp32() || bias.dtype() == QNK_BF16));
    }
};

// A bias in fp32.
class Bias {
  public:
    explicit Bias(const View& bias) : widened_(bias.given() && !bias.fp32() ? bias.count() : 0) {
        values_ = bias.data<const float>();
        if (!bias.given() || bias.fp32() || !widened_) return;
        const bf16* from = bias.data<const bf16>();
        for (int64_t i = 0; i < bias.count(); ++i) widened_.get()[i] = to_float(from[i]);
        values_ = widened_.get();
    }
    explicit operator bool() const { return static_cast<bool>(widened_); }
    const float* values() const { return values_; }

  private:
    Buffer<float> widened_;
    const float* values_;
};

// What kernel() returns, run without the interpreter's lock.
template <typename Kernel>
int unlocked(const Kernel& kernel) {
    void* state = PyEval_SaveThread();
    const int status = kernel();
    PyEval_RestoreThread(state);
    return status;
}

}  // namespace
}  // namespace qnk

int qnk_cpu_tensors(const void* table, void* py_none) {
    using namespace qnk;
    const auto* offered = static_cast<const DlExchange*>(table);
    const bool python = PyEval_SaveThread && PyEval_RestoreThread && PyErr_Clear;
    if (!python || offered->version[0] != kDlVersion || !offered->view) return 0;
    exchange = offered;
    none = py_none;
    return 1;
}

int qnk_cpu_int_linear_tensors(void* x, void* weight, void* scale, void* zero_point, void* bias, void* y, int bits) {
    using namespace qnk;
    Layer layer;
    if (!layer.take({x, weight, scale, zero_point, bias, y}, bits)) return QNK_NOT_SERVED;
    return unlocked([&] {
        const Bias fp32(layer.bias);
        if (!fp32) return static_cast<int>(QNK_NO_MEMORY);
        return qnk_cpu_int_linear(layer.x.data<void>(), layer.x.dtype(), layer.weight.data<uint8_t>(),
                                  layer.scale.data<float>(), layer.zero_point.data<uint8_t>(), fp32.values(),
                                  layer.y.data<void>(), layer.m, layer.n, layer.k, layer.groups, bits);
    });
}

int qnk_cpu_int_linear_quantized_tensors(void* x, void* weight, void* scale, void* zero_point, void* bias, void* y,
                                         int bits, void* x_scale, void* x_zero_point) {
    using namespace qnk;
    Layer layer;
    View range[2];
    if (!layer.take({x, weight, scale, zero_point, bias, y}, bits)) return QNK_NOT_SERVED;
    void* const given[] = {x_scale, x_zero_point};
    for (int i = 0; i < 2; ++i)
        if (!range[i].of(given[i]) || (range[i].given() && (!range[i].fp32() || range[i].dims() != 0))) return QNK_NOT_SERVED;
    if (range[0].given() != range[1].given()) return QNK_NOT_SERVED;
    return unlocked([&] {
        const Bias fp32(layer.bias);
        if (!fp32) return static_cast<int>(QNK_NO_MEMORY);
        return qnk_cpu_int_linear_quantized(layer.x.data<void>(), layer.x.dtype(), range[0].data<float>(),
                                            range[1].data<float>(), layer.weight.data<uint8_t>(), layer.scale.data<float>(),
                                            layer.zero_point.data<uint8_t>(), fp32.values(), layer.y.data<void>(), layer.m,
                                            layer.n, layer.k, layer.groups, bits);
    });
}
