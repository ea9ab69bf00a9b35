// What thread `thread` of `threads` does of llama_ops/rotary.h.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/rotary.h"

namespace llama_ops {
namespace LLAMA_OPS_BASE {

// A share of the rows; no barrier.
void rotary_part(const llama_ops_rotary_args&, int thread, int threads);

}  // namespace LLAMA_OPS_BASE
}  // namespace llama_ops
