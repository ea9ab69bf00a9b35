/* Decoder layers of a Llama over packed tokens and a paged cache, each from norm to residual sum.
 *
 * All layers of a call run in one parallel region: at one token per step a product takes tens of
 * microseconds, which is what opening a region costs.
 */
#ifndef LLAMA_OPS_DECODER_H
#define LLAMA_OPS_DECODER_H

#include "llama_ops/common.h"
#include "llama_ops/linear.h"
#include "llama_ops/low_rank.h"

typedef struct llama_ops_decoder_layer {
  const float* input_norm; /* [hidden], weight of the norm before attention */
  const float* post_norm;  /* [hidden], weight of the norm before the feed-forward */
  llama_ops_linear_weight qkv; /* outputs: query heads, then heads of keys, then of values */
  llama_ops_linear_weight o;
  llama_ops_linear_weight gate_up; /* outputs: all of the gate, then all of its factor */
  llama_ops_linear_weight down;
  const float* qkv_bias; /* [outputs] of each, or null */
  const float* o_bias;
  const float* gate_up_bias;
  const float* down_bias;
  void* k_cache; /* [blocks, block, groups, stored] of cache_dtype */
  void* v_cache; /* [blocks, block, groups, stored] of cache_dtype */
  llama_ops_low_rank_pieces low_rank[4]; /* beside qkv, o, gate_up and down; count 0 for none */
} llama_ops_decoder_layer;

/* Tokens, sequences and cache are those of llama_ops/paged_attention.h. */
typedef struct llama_ops_decoder_args {
  const float* x; /* [tokens, hidden] */
  float* out;     /* [tokens, hidden]; may be x */
  const llama_ops_decoder_layer* layers;
  const float* frequency;     /* [dim / 2], angles of position 1 */
  const int32_t* block_table; /* [sequences, table_width] */
  const int32_t* sequence;    /* [tokens] */
  const int32_t* position;    /* [tokens] */
  int64_t num_layers;
  int64_t tokens;
  int64_t hidden;
  int64_t ffn;
  int64_t heads;
  int64_t groups;
  int64_t dim;
  int64_t block;
  int64_t table_width;
  float eps;       /* of the norms */
  int cache_dtype; /* enum llama_ops_dtype: float32, bf16 or int8 */
} llama_ops_decoder_args;

LLAMA_OPS_API void llama_ops_decoder(const llama_ops_decoder_args* args);

#endif
