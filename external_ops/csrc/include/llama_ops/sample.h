/* From logits to tokens: what external_ops/sampling.py defines, a row for each token wanted. A row's
 * outcome depends on nothing else in the call. */
#ifndef LLAMA_OPS_SAMPLE_H
#define LLAMA_OPS_SAMPLE_H

#include "llama_ops/common.h"

enum { LLAMA_OPS_SAMPLE_BROKEN = -1, LLAMA_OPS_SAMPLE_RULED_OUT = -2 };

/* How a token is drawn. */
typedef struct llama_ops_sample_settings {
  double temperature; /* divides the scores; 0 takes the largest */
  double top_k;       /* the largest stay; 0 is all */
  double top_p;       /* the largest stay whose share reaches it; 1 is all */
  double min_p;       /* those stay that are at least this share of the largest; 0 is all */
  double place;       /* in [0, 1): where in the sum of what stays */
} llama_ops_sample_settings;

typedef struct llama_ops_sample_args {
  const float* logits;    /* [rows, width] */
  const float* edited;    /* [any, width]: scores in place of logits */
  const int64_t* edit;    /* [rows]: which of them, or -1 */
  const llama_ops_sample_settings* settings; /* [rows] */
  int64_t* tokens;        /* [rows]; BROKEN where logits hold NaN or infinity, RULED_OUT where all
                             scores are -infinity */
  double* logprobs;       /* [rows]: logarithm of the token's share of exp(logits); 0 without one */
  int64_t rows;
  int64_t width;
} llama_ops_sample_args;

LLAMA_OPS_API void llama_ops_sample(const llama_ops_sample_args* args);

#endif
