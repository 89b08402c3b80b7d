// Barriers, shuffles, votes and reductions. Included by cuda.h.
#pragma once

// A default argument of a function that takes the place of the call.
#define QNK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(QNK_HERE) { emulator::barrier(true, file, line); }
inline int __syncthreads_count(int predicate, QNK_HERE) { return emulator::barrier(predicate != 0, file, line); }
inline int __syncthreads_or(int predicate, QNK_HERE) { return emulator::barrier(predicate != 0, file, line) > 0; }
inline int __syncthreads_and(int predicate, QNK_HERE) { return emulator::barrier(predicate == 0, file, line) == 0; }
namespace qnk {
template <int Threads>
void barrier_sync(int id, QNK_HERE) {
    emulator::named_barrier(id, Threads, true, file, line);
}
template <int Threads>
void barrier_arrive(int id, QNK_HERE) {
    emulator::named_barrier(id, Threads, false, file, line);
}
}  // namespace qnk
#undef QNK_HERE

namespace emulator {

template <typename T>
struct Shuffle {
    T value;
    int source;  // lane
    T result;
    bool lost;  // the source is absent
};

template <typename T>
void combine_shuffle(void* const (&payload)[kLanes]) {
    for (void* one : payload) {
        if (!one) continue;
        auto* mine = static_cast<Shuffle<T>*>(one);
        auto* source = static_cast<Shuffle<T>*>(payload[mine->source]);
        mine->lost = source == nullptr;
        if (source) mine->result = source->value;
    }
}

template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* name) {
    Shuffle<T> payload{value, source, value, false};
    collective(mask, combine_shuffle<T>, &payload, name);
    if (payload.lost) fail("%s from lane %d, which takes no part", name, source);
    return payload.result;
}

struct Vote {
    bool predicate;
    uint32_t ballot, present;
};

inline void combine_vote(void* const (&payload)[kLanes]) {
    uint32_t ballot = 0, present = 0;
    for (int l = 0; l < kLanes; ++l)
        if (payload[l]) {
            present |= 1u << l;
            ballot |= static_cast<uint32_t>(static_cast<Vote*>(payload[l])->predicate) << l;
        }
    for (void* one : payload)
        if (one) static_cast<Vote*>(one)->ballot = ballot, static_cast<Vote*>(one)->present = present;
}

inline Vote vote(uint32_t mask, bool predicate, const char* name) {
    Vote payload{predicate, 0, 0};
    collective(mask, combine_vote, &payload, name);
    return payload;
}

inline void combine_nothing(void* const (&)[kLanes]) {}

struct Reduction {
    uint32_t value;
    uint32_t result;
};

template <typename Combine2>
void combine_reduction(void* const (&payload)[kLanes]) {
    bool first = true;
    uint32_t total = 0;
    for (void* one : payload) {
        if (!one) continue;
        const uint32_t value = static_cast<Reduction*>(one)->value;
        total = first ? value : Combine2()(total, value);
        first = false;
    }
    for (void* one : payload)
        if (one) static_cast<Reduction*>(one)->result = total;
}

template <typename Combine2>
uint32_t reduce(uint32_t mask, uint32_t value, const char* name) {
    Reduction payload{value, 0};
    collective(mask, combine_reduction<Combine2>, &payload, name);
    return payload.result;
}

struct Add {
    uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};
template <typename T>
struct Least {
    uint32_t operator()(uint32_t a, uint32_t b) const { return static_cast<T>(b) < static_cast<T>(a) ? b : a; }
};
template <typename T>
struct Largest {
    uint32_t operator()(uint32_t a, uint32_t b) const { return static_cast<T>(a) < static_cast<T>(b) ? b : a; }
};

}  // namespace emulator

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    emulator::collective(mask, emulator::combine_nothing, nullptr, "__syncwarp");
}
// Lanes are in segments of `width`; a source outside the own segment is the lane itself.
template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    const int base = emulator::lane() & ~(width - 1);
    return emulator::shuffle(mask, value, base + (source & (width - 1)), "__shfl_sync");
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    const int lane = emulator::lane(), source = lane ^ bits;
    return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, "__shfl_xor_sync");
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
    return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : lane, "__shfl_down_sync");
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
    return emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(uint32_t mask, int p) { return emulator::vote(mask, p != 0, "__ballot_sync").ballot; }
inline int __any_sync(uint32_t mask, int p) { return emulator::vote(mask, p != 0, "__any_sync").ballot != 0; }
inline int __all_sync(uint32_t mask, int p) {
    const emulator::Vote vote = emulator::vote(mask, p != 0, "__all_sync");
    return vote.ballot == vote.present;
}
// Which lanes run together is not defined: here never more than one.
inline unsigned __activemask() { return 1u << emulator::lane(); }
inline unsigned __reduce_add_sync(uint32_t mask, unsigned v) {
    return emulator::reduce<emulator::Add>(mask, v, "__reduce_add_sync");
}
inline int __reduce_add_sync(uint32_t mask, int v) {
    return static_cast<int>(emulator::reduce<emulator::Add>(mask, static_cast<uint32_t>(v), "__reduce_add_sync"));
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned v) {
    return emulator::reduce<emulator::Least<uint32_t>>(mask, v, "__reduce_min_sync");
}
inline int __reduce_min_sync(uint32_t mask, int v) {
    return static_cast<int>(
        emulator::reduce<emulator::Least<int32_t>>(mask, static_cast<uint32_t>(v), "__reduce_min_sync"));
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned v) {
    return emulator::reduce<emulator::Largest<uint32_t>>(mask, v, "__reduce_max_sync");
}
inline int __reduce_max_sync(uint32_t mask, int v) {
    return static_cast<int>(
        emulator::reduce<emulator::Largest<int32_t>>(mask, static_cast<uint32_t>(v), "__reduce_max_sync"));
}
