// Low-rank products as parts, for kernels that run them beside other things:
//
//   low_rank_inner_part(args, thread, threads)   x a^T into args.workspace
//   -- barrier --
//   low_rank_outer_part(args, thread, threads)   its products with b, added to out
//   -- barrier: before another thread reads `out` or writes the workspace again --
#pragma once

#include "cpu/simd.h"
#include "llama_ops/low_rank.h"

namespace llama_ops {
namespace LLAMA_OPS_BASE {

// Bytes that args.workspace needs, 64-byte aligned.
int64_t low_rank_workspace(const llama_ops_low_rank_pieces& of);

// Multiplications of one thread, in vectors.
double low_rank_work(const llama_ops_low_rank_pieces& of, int64_t inputs);

void low_rank_inner_part(const llama_ops_low_rank_args& args, int thread, int threads);

void low_rank_outer_part(const llama_ops_low_rank_args& args, int thread, int threads);

}  // namespace LLAMA_OPS_BASE
}  // namespace llama_ops
