/* Causal attention by tiles with an online softmax (FlashAttention, Dao et al. 2022; the online
 * softmax of Milakov and Gimelshein 2018): memory grows with the rows, not with their square.
 *
 * B batch, S queries, K keys, H query heads, G key/value heads, D size of a head. Query head h
 * reads key/value head h / (H / G). Query s of a row sees key j where j <= prefix + s and both
 * belong to the same segment.
 */
#ifndef LLAMA_OPS_FLASH_ATTENTION_H
#define LLAMA_OPS_FLASH_ATTENTION_H

#include "llama_ops/common.h"

/* Key segment that queries of every segment see, but padding. */
#define LLAMA_OPS_EVERY_SEGMENT INT32_MIN

/* out = softmax(scale * q k^T) v. */
typedef struct llama_ops_flash_attention_forward_args {
  const void* q;               /* [B, S, H, D] of dtype */
  const void* k;               /* [B, K, G, D] of dtype */
  const void* v;               /* [B, K, G, D] of dtype */
  const int32_t* segments;     /* [B, S]; negative is padding, which sees nothing; or null */
  const int32_t* key_segments; /* [B, K]; null exactly where segments is */
  void* out;                   /* [B, S, H, D] of dtype; 0 where a query sees nothing */
  float* lse; /* [B, H, S]: logarithm of the softmax's denominator, -infinity for nothing seen */
  float* lse_rest; /* [B, H, S]: what rounding took from lse; GPUs neither write nor read it */
  int64_t batch, queries, keys, heads, groups, size;
  int64_t prefix; /* keys that query 0 sees beside its own; `keys` shows every key to every query */
  float scale;
  int dtype; /* enum llama_ops_dtype */
} llama_ops_flash_attention_forward_args;

LLAMA_OPS_API void llama_ops_flash_attention_forward(
    const llama_ops_flash_attention_forward_args* args);

/* Gradients of the above. Sums are in one order whatever the number of threads. */
typedef struct llama_ops_flash_attention_backward_args {
  llama_ops_flash_attention_forward_args forward; /* as it was called, results included */
  const void* grad_out;                           /* [B, S, H, D] of dtype */
  void* grad_q;                                   /* [B, S, H, D] of dtype */
  void* grad_k;                                   /* [B, K, G, D] of dtype */
  void* grad_v;                                   /* [B, K, G, D] of dtype */
} llama_ops_flash_attention_backward_args;

LLAMA_OPS_API void llama_ops_flash_attention_backward(
    const llama_ops_flash_attention_backward_args* args);

#endif
