// What every operator on a paged cache checks before it reads or writes a block.
#pragma once

#include "llama_ops/paged_attention.h"
#include "paddle/checks.h"

namespace llama_ops {

// What the numbers of a cache [blocks, block, G, ...] are, and how many a head has.
struct Stored {
  int dtype;
  int64_t dim;
};

inline Stored stored_in(const paddle::Tensor& cache, const char* op) {
  const int64_t numbers = cache.shape().back();
  if (cache.dtype() != paddle::DataType::INT8) return {dtype_of(cache, op), numbers};
  return {LLAMA_OPS_I8, numbers - LLAMA_OPS_SCALE_BYTES};
}

// Where tokens lie; `args` of an operator has the other half of these under the same names.
struct PagedPlan {
  const int32_t* block_table;  // [sequences, table_width]
  const int32_t* sequence;     // [tokens]; negative: padding
  const int32_t* position;     // [tokens]; negative: padding
  int64_t tokens, sequences, table_width;
  int64_t block, blocks;  // positions of a block, blocks of the cache
};

// Raises where a token lies outside of the table, or can see a block outside of the cache.
inline void check_plan(const PagedPlan& a, const char* op) {
  int64_t known = -1, checked = 0;  // the first blocks of sequence `known` exist
  for (int64_t token = 0; token < a.tokens; ++token) {
    const int64_t sequence = a.sequence[token], position = a.position[token];
    if (sequence < 0 || position < 0) continue;
    LLAMA_OPS_CHECK(sequence < a.sequences, op, "token ", token, " is of sequence ", sequence,
                    ", but the block table has ", a.sequences, " rows");
    LLAMA_OPS_CHECK(position / a.block < a.table_width, op, "token ", token, " has position ",
                    position, ", but a row of the block table reaches ",
                    a.table_width * a.block - 1, "; widen it");
    if (sequence != known) known = sequence, checked = 0;
    for (; checked <= position / a.block; ++checked) {
      const int64_t number = a.block_table[sequence * a.table_width + checked];
      LLAMA_OPS_CHECK(number >= 0 && number < a.blocks, op, "sequence ", sequence, " owns block ",
                      number, " for positions up to ", position, ", but the cache has ", a.blocks,
                      " blocks");
    }
  }
}

}  // namespace llama_ops
