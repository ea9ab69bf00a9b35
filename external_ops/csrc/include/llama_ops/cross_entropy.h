/* Cross-entropy from logits that exist already, such as those of a few rows at a time: what the loss
 * needs of them in one go, and their gradient in their own place. With a vocabulary that processes
 * share, each looks at its part (Shoeybi et al. 2019). */
#ifndef LLAMA_OPS_CROSS_ENTROPY_H
#define LLAMA_OPS_CROSS_ENTROPY_H

#include "llama_ops/common.h"

/* Reads logits; the loss of a row is log(sum) + top - target. */
typedef struct llama_ops_cross_entropy_statistics_args {
  const float* logits;   /* [rows, width] */
  const int64_t* labels; /* [rows], tokens of the whole vocabulary */
  float* top;            /* [rows]: the largest logit */
  float* sum;            /* [rows]: sum of exp(logit - top) */
  float* target;         /* [rows]: the label's logit; 0 where it is none of these tokens */
  int64_t* best;         /* [rows]: the first column of the largest logit; may be null */
  int64_t rows;
  int64_t width;
  int64_t first; /* token of the first column */
} llama_ops_cross_entropy_statistics_args;

LLAMA_OPS_API void llama_ops_cross_entropy_statistics(
    const llama_ops_cross_entropy_statistics_args* args);

/* Makes logits their gradient: scale * (exp(logit - denominator) - 1 at the label), 0 where scale
 * is 0. */
typedef struct llama_ops_cross_entropy_residual_args {
  float* logits;            /* [rows, width], replaced */
  const int64_t* labels;    /* [rows], tokens of the whole vocabulary */
  const float* denominator; /* [rows]: logarithm of softmax's denominator */
  const float* scale;       /* [rows]: gradient of the row's loss */
  int64_t rows;
  int64_t width;
  int64_t first; /* token of the first column */
} llama_ops_cross_entropy_residual_args;

LLAMA_OPS_API void llama_ops_cross_entropy_residual(
    const llama_ops_cross_entropy_residual_args* args);

#endif
