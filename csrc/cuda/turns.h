// Two warpgroups of a block, 256 threads, that take turns with the tensor cores: a warp whose products have A in
// registers is held up until all but the last of them run, so without turns both multiply at the same time, and then
// both decode while the tensor cores idle.
//
// Barriers 1 and 2, of 256 threads each: a warpgroup waits at its own, to which all of the other one have to come.
//   start(), once; then as often in both warpgroups: wait(), products, commit, pass(); finish(), once
// No thread waits forever, and nothing is left over, as each barrier has as many arrivals as waits: with n turns,
// barrier 1 (of warpgroup 0) has n waits and finish(), and start() and n passes; barrier 2 has n of both. They complete
// one after another, 1, 2, 1, 2, ..., 1: pass() after turn i comes after the wait of that turn, thus after the wait of
// the other's turn before it, so that a barrier never has arrivals of two turns. Warpgroup 0 goes first.
// What a warpgroup wrote, or waited for, before pass(), or in wait(), is there for the other after its wait(); and what
// one of its warps did before wait(), for the others after it. So turns take the place of block barriers.
#pragma once

#include "cuda/primitives.h"

namespace qnk {

class Turns {
  public:
    __device__ __forceinline__ void start() const {
        if (threadIdx.x >= 128) barrier_arrive<256>(1);
    }
    __device__ __forceinline__ void wait() const {
        barrier_sync<256>(mine_);
    }
    __device__ __forceinline__ void pass() const {
        barrier_arrive<256>(3 - mine_);
    }
    __device__ __forceinline__ void finish() const {
        if (threadIdx.x < 128) barrier_sync<256>(1);
    }

  private:
    int mine_ = threadIdx.x < 128 ? 1 : 2;
};

}  // namespace qnk
