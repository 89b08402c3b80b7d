// What a library needs of DLPack, version 1 (https://dmlc.github.io/dlpack), to look at tensors that are Python objects.
#pragma once

#include <stdint.h>

namespace qnk {

struct DlTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t code, bits;  // of the dtype
    uint16_t lanes;
    int64_t *shape, *strides;  // [dims], strides in elements
    uint64_t byte_offset;
};

constexpr int32_t kDlCpu = 1;
constexpr uint8_t kDlUnsigned = 1, kDlFloat = 2, kDlBfloat = 4;
constexpr uint32_t kDlVersion = 1;  // the first of two numbers; others have other tables

// Table of functions that a type of tensors offers as its attribute __dlpack_c_exchange_api__.
struct DlExchange {
    uint32_t version[2];
    DlExchange* previous;
    void (*unused[3])();  // which own memory
    // A view of a tensor, valid for as long as nothing else touches it; 0, or -1 with a Python exception.
    int (*view)(void* object, DlTensor* view);
    void (*stream)();
};

}  // namespace qnk
