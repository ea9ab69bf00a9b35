/* Attention of packed tokens over a paged key/value cache (Kwon et al. 2023, vLLM).
 *
 * Sequence n owns the cache blocks in row n of the block table; its position p lies in block
 * block_table[n, p / block] at offset p % block.
 *
 * A head in the cache is `stored` numbers long: dim of float32 or bf16. In int8 they are dim integers and
 * behind them LLAMA_OPS_SCALE_BYTES, a float32 that the integers are multiplied by: the head's largest
 * number / 127, so that what is cached depends on nothing but the head itself. A head with a number that
 * is not finite has the scale NaN.
 */
#ifndef LLAMA_OPS_PAGED_ATTENTION_H
#define LLAMA_OPS_PAGED_ATTENTION_H

#include "llama_ops/common.h"

#define LLAMA_OPS_SCALE_BYTES 4

/* Writes the step's keys and values into the cache, then attends causally with scale 1 / sqrt(dim).
 *
 * Tokens of one sequence lie side by side with ascending positions, and all earlier positions are
 * in the cache or in this step. A token whose sequence or position is negative is padding: nothing is
 * written, its output is zero. q, k and v may be parts of one product: each has its own distance
 * between tokens, while the heads of a token lie side by side. */
typedef struct llama_ops_paged_attention_args {
  const float* q;   /* [tokens, heads, dim] */
  const float* k;   /* [tokens, groups, dim] */
  const float* v;   /* [tokens, groups, dim] */
  const float* cos; /* [tokens, dim / 2]: q and k are yet to be rotated; null: they are rotated */
  const float* sin; /* [tokens, dim / 2] */
  void* k_cache;    /* [blocks, block, groups, stored] of cache_dtype */
  void* v_cache;    /* [blocks, block, groups, stored] of cache_dtype */
  const int32_t* block_table; /* [sequences, table_width] */
  const int32_t* sequence;    /* [tokens] */
  const int32_t* position;    /* [tokens] */
  float* out;                 /* [tokens, heads, dim] */
  int64_t q_stride;           /* numbers from one token to the next */
  int64_t k_stride;
  int64_t v_stride;
  int64_t tokens;
  int64_t heads; /* a multiple of groups */
  int64_t groups;
  int64_t dim;
  int64_t block;
  int64_t table_width;
  int cache_dtype; /* enum llama_ops_dtype: float32, bf16 or int8 */
} llama_ops_paged_attention_args;

LLAMA_OPS_API void llama_ops_paged_attention(const llama_ops_paged_attention_args* args);

#endif
