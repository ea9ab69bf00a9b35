// Threads and scratch memory for kernels. Every kernel is a `part`, what thread `thread` of `threads`
// does, so that several kernels can share one parallel region (csrc/cpu/decoder.cc).
#pragma once

#include <omp.h>
#include <stdint.h>

#include "llama_ops/threads.h"

namespace llama_ops {

// Scratch memory of this thread, 64-byte aligned, kept until the thread ends; each slot is one
// buffer, grown when needed, whose contents do not survive the next call with the same slot.
void* scratch(int slot, int64_t bytes);

namespace LLAMA_OPS_LEVEL {

struct Range {
  int64_t begin, end;
};

// The share of `count` items that falls to a thread, in whole multiples of `grain`.
inline Range share(int64_t count, int64_t grain, int thread, int threads) {
  int64_t blocks = (count + grain - 1) / grain;
  int64_t begin = blocks * thread / threads * grain, end = blocks * (thread + 1) / threads * grain;
  return {begin < count ? begin : count, end < count ? end : count};
}

// Calls part(thread, threads) on every thread of a team, which is as large as the work repays
// (llama_ops/threads.h): so many nanoseconds on one thread, or elementary operations, of which one
// takes about as long; threads meet so many times in it.
template <class Part>
inline void on_threads(double work, const Part& part, int64_t meetings = 0) {
  if (omp_in_parallel()) {
    part(0, 1);
    return;
  }
  const int wanted = llama_ops_threads_for(work, meetings);
  if (wanted == 1) {
    part(0, 1);
  } else {
#pragma omp parallel num_threads(wanted)
    part(omp_get_thread_num(), omp_get_num_threads());
  }
  llama_ops_threads_done();
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
