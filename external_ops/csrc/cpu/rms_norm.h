// What thread `thread` of `threads` does of llama_ops/rms_norm.h.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/rms_norm.h"

namespace llama_ops {
namespace LLAMA_OPS_BASE {

// A share of the rows; no barrier.
void rms_norm_forward_part(const llama_ops_rms_norm_forward_args&, int thread, int threads);

}  // namespace LLAMA_OPS_BASE
}  // namespace llama_ops
