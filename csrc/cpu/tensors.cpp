// Ops as Python functions in C++. In Python, to look at tensors' shapes one by one and to hand over twelve numbers takes
// longer than a small layer takes to compute, and ten times as long where a large one has just driven the interpreter
// out of the caches.
//
// What is not in the plainest form (dtypes, shapes, devices, order in memory), or is looked at by anybody (see
// qnkernels/ops/direct.py), is not served and left to the caller, who says what is wrong with it or brings it into that
// form. Python's interface is declared here, by what its versions have in common, so that building takes no headers of it.
#include "common/dtype.h"
#include "cpu/buffer.h"
#include "cpu/dlpack.h"
#include "qnkernels.h"

extern "C" {
struct PyMethod {
    const char* name;
    void* (*function)(void* self, void* const* arguments, long count);
    int flags;
    const char* text;
};
#define QNK_PYTHON __attribute__((weak))
QNK_PYTHON void* PyEval_SaveThread(void);
QNK_PYTHON void PyEval_RestoreThread(void* state);
QNK_PYTHON void PyErr_Clear(void);
QNK_PYTHON void Py_IncRef(void* object);
QNK_PYTHON void Py_DecRef(void* object);
QNK_PYTHON void* PyTuple_New(long count);
QNK_PYTHON void* PyTuple_GetItem(void* tuple, long index);
QNK_PYTHON int PyTuple_SetItem(void* tuple, long index, void* object);  // which takes the reference over
QNK_PYTHON void* PyObject_Type(void* object);
QNK_PYTHON int PyObject_IsTrue(void* object);
QNK_PYTHON void* PyObject_GetAttr(void* object, void* name);
QNK_PYTHON void* PyObject_CallNoArgs(void* callable);
QNK_PYTHON void* PyObject_CallObject(void* callable, void* tuple);
QNK_PYTHON void* PyObject_CallFunctionObjArgs(void* callable, ...);  // up to a null pointer
QNK_PYTHON void* PyLong_FromLongLong(long long value);
QNK_PYTHON long long PyLong_AsLongLong(void* object);
QNK_PYTHON void* PyCFunction_NewEx(PyMethod* method, void* self, void* module);
}

namespace qnk {
namespace {

constexpr int kFastCall = 0x80;  // METH_FASTCALL
constexpr int kMostDims = 8;     // of x

// What the functions need of Python, in the order of the tuple that qnk_cpu_tensors takes.
enum Known {
    kNone, kInt, kTensor, kParameter,  // None; types
    kNewEmpty, kIsNegative, kIsWrapped, kIsGradEnabled,  // Tensor.new_empty(x, *sizes), Tensor.is_neg(x), ...
    kProfiler, kProfilerName, kForward, kForwardName,  // modules, and an attribute of each
    kIsCpu, kRequiresGrad,  // names
    kFunctionModes, kDispatchModes, kTransforms, kTracing,  // functions, which return something false while there is none
    kKnown
};

const DlExchange* exchange = nullptr;
void* known[kKnown];

// Whether a new object, which is given up, is true, or is not there.
bool is_true(void* object) {
    const int truth = object ? PyObject_IsTrue(object) : -1;
    if (object) Py_DecRef(object);
    if (truth < 0) PyErr_Clear();
    return truth != 0;
}

// Whether anybody looks at ops.
bool watched() {
    for (int i = kFunctionModes; i <= kTracing; ++i)
        if (is_true(PyObject_CallNoArgs(known[i]))) return true;
    if (is_true(PyObject_GetAttr(known[kProfiler], known[kProfilerName]))) return true;
    void* level = PyObject_GetAttr(known[kForward], known[kForwardName]);
    const long long value = level ? PyLong_AsLongLong(level) : 0;  // (-1 with no level, and where there is no number)
    if (level) Py_DecRef(level);
    PyErr_Clear();
    return value >= 0;
}

bool is_of(void* object, Known one, Known other) {
    void* type = PyObject_Type(object);
    Py_DecRef(type);  // (which lives as long as the object)
    return type == known[one] || type == known[other];
}

// A contiguous tensor of the processor.
class View {
  public:
    // Null where there is None, false where there is anything else.
    bool of(void* object) {
        given_ = object != known[kNone];
        if (!given_) return true;
        if (!is_of(object, kTensor, kParameter)) return false;
        if (exchange->view(object, &tensor_) != 0) {
            PyErr_Clear();
            return false;
        }
        if (!tensor_.data || tensor_.device_type != kDlCpu || tensor_.lanes != 1) return false;
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

// The arguments of a layer over a packed weight, as qnk_cpu_int_linear has them, but for y.
struct Layer {
    View x, weight, scale, zero_point, bias;
    int64_t m, n, k, groups;
    int bits;

    // x, weight, scale, zero point, bias, bits
    bool take(void* const* given) {
        View* views[] = {&x, &weight, &scale, &zero_point, &bias};
        for (int i = 0; i < 5; ++i)
            if (!views[i]->of(given[i])) return false;
        if (!is_of(given[5], kInt, kInt)) return false;
        const long long wanted = PyLong_AsLongLong(given[5]);
        if (wanted == -1) PyErr_Clear();
        if ((wanted != 4 && wanted != 8) || !x.given() || !weight.given() || !scale.given()) return false;
        bits = static_cast<int>(wanted);
        if (!weight.is(kDlUnsigned, 8) || weight.dims() != 2 || !scale.fp32() || scale.dims() != 2) return false;
        n = weight.size(0);
        k = weight.size(1) * 8 / bits;
        groups = scale.size(1);
        if (scale.size(0) != n || k % groups) return false;
        if (zero_point.given() && (!zero_point.is(kDlUnsigned, 8) || zero_point.dims() != 2 || zero_point.size(0) != n ||
                                   zero_point.size(1) != groups))
            return false;
        if (x.dtype() < 0 || x.last() != k || x.dims() > kMostDims) return false;
        m = x.count() / k;
        return !bias.given() || (bias.dims() == 1 && bias.size(0) == n && (bias.fp32() || bias.dtype() == QNK_BF16));
    }

    // y [.., n] in the dtype of x, a new object; null without memory.
    void* result(void* x_object) const {
        const int dims = x.dims();
        void* arguments = PyTuple_New(1 + dims);
        void* y = nullptr;
        if (arguments) {
            Py_IncRef(x_object);
            PyTuple_SetItem(arguments, 0, x_object);
            bool whole = true;
            for (int i = 0; i < dims; ++i) {
                void* size = PyLong_FromLongLong(i + 1 < dims ? x.size(i) : n);
                whole = whole && size;
                PyTuple_SetItem(arguments, 1 + i, size);
            }
            if (whole) y = PyObject_CallObject(known[kNewEmpty], arguments);
            Py_DecRef(arguments);
        }
        if (!y) PyErr_Clear();
        return y;
    }
};

// Whether a gradient is wanted of one of these tensors, of which some may be None.
bool differentiated(void* const* tensors, const int* which, int count) {
    if (!is_true(PyObject_CallNoArgs(known[kIsGradEnabled]))) return false;
    for (int i = 0; i < count; ++i)
        if (tensors[which[i]] != known[kNone] && is_true(PyObject_GetAttr(tensors[which[i]], known[kRequiresGrad]))) return true;
    return false;
}

// Whether x has outlived its transform, or one of these tensors, of which some may be None, is the imaginary part of a
// conjugate, whose sign is still to be flipped.
bool unfinished(void* const* tensors, const int* which, int count) {
    for (int i = 0; i < count; ++i) {
        void* tensor = tensors[which[i]];
        if (tensor != known[kNone] && is_true(PyObject_CallFunctionObjArgs(known[kIsNegative], tensor, nullptr))) return true;
    }
    return is_true(PyObject_CallFunctionObjArgs(known[kIsWrapped], tensors[0], nullptr));
}

// Whether x is not served, for what is soon seen.
bool elsewhere(void* x) {
    return !is_of(x, kTensor, kParameter) || !is_true(PyObject_GetAttr(x, known[kIsCpu])) || watched();
}

void* none() {
    Py_IncRef(known[kNone]);
    return known[kNone];
}

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

// y of kernel(layer, bias, y), run without the interpreter's lock, or None.
template <typename Kernel>
void* computed(const Layer& layer, void* x, const Kernel& kernel) {
    void* y = layer.result(x);
    View view;
    int status = QNK_NO_MEMORY;
    if (y && view.of(y) && view.dtype() == layer.x.dtype() && view.count() == layer.m * layer.n) {
        void* state = PyEval_SaveThread();
        {
            const Bias bias(layer.bias);
            if (bias) status = kernel(bias.values(), view.data<void>());
        }
        PyEval_RestoreThread(state);
    }
    if (status == QNK_OK) return y;
    if (y) Py_DecRef(y);
    return none();
}

// (x, weight, scale, zero point, bias, bits)
void* int_linear(void*, void* const* given, long count) {
    static const int floats[] = {0, 2, 4};
    Layer layer;
    if (count != 6 || elsewhere(given[0]) || !layer.take(given) || unfinished(given, floats, 3) ||
        differentiated(given, floats, 3))
        return none();
    return computed(layer, given[0], [&](const float* bias, void* y) {
        return qnk_cpu_int_linear(layer.x.data<void>(), layer.x.dtype(), layer.weight.data<uint8_t>(),
                                  layer.scale.data<float>(), layer.zero_point.data<uint8_t>(), bias, y, layer.m, layer.n,
                                  layer.k, layer.groups, layer.bits);
    });
}

// (x, weight, scale, zero point, bias, bits, x scale, x zero point)
void* int_linear_quantized(void*, void* const* given, long count) {
    static const int floats[] = {0, 2, 4, 6, 7};
    Layer layer;
    View range[2];
    if (count != 8 || elsewhere(given[0]) || !layer.take(given)) return none();
    for (int i = 0; i < 2; ++i)
        if (!range[i].of(given[6 + i]) || (range[i].given() && (!range[i].fp32() || range[i].dims() != 0))) return none();
    if (range[0].given() != range[1].given() || unfinished(given, floats, 5) || differentiated(given, floats, 5))
        return none();
    return computed(layer, given[0], [&](const float* bias, void* y) {
        return qnk_cpu_int_linear_quantized(layer.x.data<void>(), layer.x.dtype(), range[0].data<float>(),
                                            range[1].data<float>(), layer.weight.data<uint8_t>(), layer.scale.data<float>(),
                                            layer.zero_point.data<uint8_t>(), bias, y, layer.m, layer.n, layer.k,
                                            layer.groups, layer.bits);
    });
}

PyMethod int_linear_method = {"int_linear", int_linear, kFastCall, nullptr};
PyMethod int_linear_quantized_method = {"int_linear_quantized", int_linear_quantized, kFastCall, nullptr};

}  // namespace
}  // namespace qnk

int qnk_cpu_tensors(const void* table, void* objects) {
    using namespace qnk;
    const auto* offered = static_cast<const DlExchange*>(table);
    if (!PyObject_CallNoArgs || !PyCFunction_NewEx || offered->version[0] != kDlVersion || !offered->view) return 0;
    exchange = offered;
    Py_IncRef(objects);  // for as long as the functions may be called, that is, for good
    for (int i = 0; i < kKnown; ++i) known[i] = PyTuple_GetItem(objects, i);
    return 1;
}

void* qnk_cpu_int_linear_function(void) { return PyCFunction_NewEx(&qnk::int_linear_method, nullptr, nullptr); }

void* qnk_cpu_int_linear_quantized_function(void) {
    return PyCFunction_NewEx(&qnk::int_linear_quantized_method, nullptr, nullptr);
}
