// What thread `thread` of `threads` does of llama_ops/paged_attention.h, in up to three steps with
// a barrier after each but the last:
//
//   cache_write_part            keys (rotated where tables are given) and values enter the cache
//   paged_attention_part        a share of the heads and tokens, and where these are too few for
//                               the threads, of the keys; the workspace then holds what it found
//   paged_attention_merge_part  puts results for parts of the keys together; needed (and so is
//                               the barrier before it) only where paged_attention_workspace is not 0
//
// A part uses scratch slots 4 and 5 of its thread; the caller allocates the workspace, one for all
// threads, elsewhere. Results are the same whatever the number of threads.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/paged_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_BASE {

void cache_write_part(const llama_ops_paged_attention_args&, int thread, int threads);

// Bytes of memory that the other two need between them.
int64_t paged_attention_workspace(const llama_ops_paged_attention_args&, int threads);
void paged_attention_part(const llama_ops_paged_attention_args&, void* workspace, int thread,
                          int threads);
void paged_attention_merge_part(const llama_ops_paged_attention_args&, void* workspace,
                                int thread, int threads);

}  // namespace LLAMA_OPS_BASE
}  // namespace llama_ops
