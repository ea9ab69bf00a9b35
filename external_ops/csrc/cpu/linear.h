// Linears with packed weights as parts, for kernels that run several of them in one parallel region.
//
//   linear_prepare_part(args, thread, threads)   rounds or rearranges x into args.prepared
//   -- barrier: every thread reads all of `prepared` --
//   linear_part(args, thread, threads)           computes this thread's outputs
//   -- barrier: before another thread reads `out`, writes `x`, or writes `prepared` again --
//
// `prepared` depends on x, rows, inputs, groups and kind only: linears that agree in those (q, k and
// v; gate and up) share one, prepared once. With few rows a thread may instead prepare one of its own,
// linear_prepare_part(args, 0, 1), and needs no barrier before linear_part.
// Both parts are empty for threads that get no share. Neither opens a parallel region. linear_part
// uses scratch slot kLinearScratch; `linear` also keeps `prepared` in kLinearPrepared.
#pragma once

#include "llama_ops/linear.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kLinearScratch = 7, kLinearPrepared = 6;

// Bytes that args.prepared needs, 64-byte aligned.
int64_t linear_prepared_bytes(const llama_ops_linear_weight& weight, int64_t rows);

void linear_prepare_part(const llama_ops_linear_args& args, int thread, int threads);

void linear_part(const llama_ops_linear_args& args, int thread, int threads);

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
