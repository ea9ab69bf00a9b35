// What thread `thread` of `threads` does of llama_ops/swiglu.h.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/swiglu.h"

namespace llama_ops {
namespace LLAMA_OPS_BASE {

// A share of the rows, or of the columns where there is one row; no barrier.
void swiglu_forward_part(const llama_ops_swiglu_forward_args&, int thread, int threads);

}  // namespace LLAMA_OPS_BASE
}  // namespace llama_ops
