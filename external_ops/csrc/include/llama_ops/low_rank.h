/* Low-rank products beside linears (Hu et al. 2021, LoRA), of several adapters at once: each row takes
 * those of its own adapter, or none (Chen et al. 2023, Punica).
 */
#ifndef LLAMA_OPS_LOW_RANK_H
#define LLAMA_OPS_LOW_RANK_H

#include "llama_ops/common.h"

/* What an adapter adds to neighbouring outputs of a linear:
 * out[row, first : first + outputs] += scale * (x[row] a^T) b, for each of its rows. */
typedef struct llama_ops_low_rank_piece {
  const void* a;       /* [rank, inputs] of dtype */
  const void* b;       /* [rank, outputs] of dtype */
  const int64_t* rows; /* [num_rows], each once */
  int64_t num_rows;
  int64_t rank;
  int64_t first;
  int64_t outputs;
  float scale;
  int dtype; /* LLAMA_OPS_F32 or LLAMA_OPS_BF16 */
} llama_ops_low_rank_piece;

/* Pieces of one linear; no two add to one number. */
typedef struct llama_ops_low_rank_pieces {
  const llama_ops_low_rank_piece* pieces; /* [count] */
  int64_t count;
} llama_ops_low_rank_pieces;

/* A row's sums are added up in one order, whatever other rows and adapters there are. */
typedef struct llama_ops_low_rank_args {
  llama_ops_low_rank_pieces of;
  const float* x;  /* [rows, inputs] */
  float* out;      /* [rows, width], added to */
  int64_t inputs;
  int64_t width;
  void* workspace; /* for callers inside csrc/cpu (cpu/low_rank.h); null otherwise */
} llama_ops_low_rank_args;

LLAMA_OPS_API void llama_ops_low_rank(const llama_ops_low_rank_args* args);

#endif
