// Work memory of a kernel.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "common/isa_namespace.h"

namespace qnk {
inline namespace QNK_ISA {

// Memory that a calling thread keeps from one kernel to the next: pages that the system hands out anew in each call
// would cost as much as many a kernel. Taken and given back in the order of a stack.
class Stack {
  public:
    static Stack& here() {
        static thread_local Stack stack;
        return stack;
    }
    ~Stack() { free(block_); }

    // Aligned to 64 bytes; null without memory.
    void* take(size_t bytes) {
        if (!depth_++ && wanted_ > size_) grow();
        need_ += bytes;
        if (need_ > wanted_) wanted_ = need_ < kKept ? need_ : kKept;
        if (used_ + bytes > size_) return aligned_alloc(64, bytes);
        void* taken = block_ + used_;
        used_ += bytes;
        return taken;
    }

    void give(void* taken, size_t bytes) {
        --depth_;
        need_ -= bytes;
        uint8_t* at = static_cast<uint8_t*>(taken);
        if (at >= block_ && at < block_ + size_)
            used_ -= bytes;
        else
            free(taken);
    }

  private:
    static constexpr size_t kKept = size_t{64} << 20;  // (gaps between what threads write are never touched)

    void grow() {
        free(block_);
        block_ = static_cast<uint8_t*>(aligned_alloc(64, wanted_));
        size_ = block_ ? wanted_ : 0;
    }

    uint8_t* block_ = nullptr;
    // bytes: of the block; of it in use; in use in all; the most that was, up to kKept
    size_t size_ = 0, used_ = 0, need_ = 0, wanted_ = 0;
    int depth_ = 0;
};

// `count` values of T, aligned to 64 bytes, or null without memory. Buffers of a thread end in the reverse order of
// their beginning, as local variables and members do.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : bytes_((static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64),
          data_(static_cast<T*>(Stack::here().take(bytes_))) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { Stack::here().give(data_, bytes_); }

    explicit operator bool() const { return data_ != nullptr; }
    T* get() const { return data_; }

  private:
    size_t bytes_;
    T* data_;
};

// `count` values of T for each of `threads`. What one thread walks through ends far from where the next one's begins: a
// prefetcher runs on past the end, and would take lines away from a thread that is writing them.
template <typename T>
class PerThread {
  public:
    PerThread(int64_t threads, int64_t count)
        : apart_(count ? (count * kSize + 63) / 64 * 64 + (threads > 1 ? kGap : 0) : 0), bytes_(threads * apart_) {}

    explicit operator bool() const { return static_cast<bool>(bytes_); }
    // Aligned to 64 bytes.
    T* of(int64_t thread) const { return reinterpret_cast<T*>(bytes_.get() + thread * apart_); }

  private:
    static constexpr int64_t kSize = sizeof(T);
    static constexpr int64_t kGap = 65536;  // bytes; half as many do nearly as well

    int64_t apart_;
    Buffer<uint8_t> bytes_;
};

}  // namespace QNK_ISA
}  // namespace qnk
