/* Products with packed weights: out = x W^T (+ bias) (+ residual), for 1 to thousands of rows.
 *
 * Packed weights have one layout for all instruction sets, so that a program that holds them runs
 * on any machine. Outputs come in panels of 64, the last filled up with zeros; inputs are filled up
 * with zeros to a multiple of 8. A panel is one stream that is read from front to back:
 *   float32   for each input, its 64 weights
 *   bfloat16  for each 2 inputs, 64 pairs
 *   int8      for each 4 inputs, 64 times four bytes: the integer + 128
 *   int4      for each 8 inputs, 64 times four bytes: byte i holds input i in its lower and input
 *             4 + i in its upper half, both + 8
 * Scales lie beside them as [panels, groups, 64]; a group is `inputs / groups` neighbouring inputs.
 */
#ifndef LLAMA_OPS_LINEAR_H
#define LLAMA_OPS_LINEAR_H

#include "llama_ops/common.h"

enum llama_ops_linear_kind {
  LLAMA_OPS_LINEAR_F32 = 0,
  LLAMA_OPS_LINEAR_BF16 = 1,             /* x is rounded to bfloat16 where the processor multiplies
                                          * bfloat16 (AVX512_BF16), and stays float32 elsewhere */
  LLAMA_OPS_LINEAR_INT8 = 2,             /* each row of x rounded to 8 bits, largest / 127 */
  LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY = 3, /* x stays float32 */
  LLAMA_OPS_LINEAR_INT4 = 4,             /* as INT8, weights of 4 bits */
  LLAMA_OPS_LINEAR_INT4_WEIGHT_ONLY = 5
};

/* Outputs of a panel, and what inputs are filled up to a multiple of. */
enum { LLAMA_OPS_LINEAR_PANEL = 64, LLAMA_OPS_LINEAR_STEP = 8 };

typedef struct llama_ops_linear_weight {
  const void* data;  /* [panels, bytes of a panel], 64-byte aligned for full speed */
  const void* scale; /* [panels, groups, 64] of scale_dtype; null for F32 and BF16 */
  int64_t outputs;
  int64_t inputs;
  int64_t groups;  /* divides inputs; with more than one, inputs / groups is a multiple of 8 */
  int kind;        /* enum llama_ops_linear_kind */
  int scale_dtype; /* LLAMA_OPS_F32 or LLAMA_OPS_BF16 */
} llama_ops_linear_weight;

typedef struct llama_ops_linear_args {
  llama_ops_linear_weight weight;
  const float* x;        /* [rows, inputs] */
  const float* bias;     /* [outputs] or null */
  const float* residual; /* [rows, outputs] or null; may be out itself */
  float* out;            /* [rows, outputs] */
  int64_t rows;
  void* prepared; /* for callers inside csrc/cpu (cpu/linear.h); null otherwise */
} llama_ops_linear_args;

LLAMA_OPS_API void llama_ops_linear(const llama_ops_linear_args* args);

/* Lays weights out. Exactly one of `wide` (F32, BF16) and `integers` (the others) is set. */
typedef struct llama_ops_linear_pack_args {
  const void* wide;      /* [outputs, inputs] of wide_dtype; [inputs, outputs] where transposed */
  const void* integers;  /* int8 [outputs, inputs]; INT4: uint8 [outputs, inputs / 2], two a byte, the
                          * even input in the lower half, both + 8 */
  const float* scale;    /* [outputs, groups]; null for F32 and BF16 */
  void* data;            /* as in llama_ops_linear_weight, written */
  void* packed_scale;    /* as in llama_ops_linear_weight, written; rounded to scale_dtype */
  int64_t outputs;
  int64_t inputs;
  int64_t groups;
  int kind;
  int scale_dtype;
  int wide_dtype; /* LLAMA_OPS_F32 or LLAMA_OPS_BF16 */
  int transposed;
} llama_ops_linear_pack_args;

LLAMA_OPS_API void llama_ops_linear_pack(const llama_ops_linear_pack_args* args);

/* The weights of some outputs, widened: rows of an embedding that is the output matrix too. */
typedef struct llama_ops_linear_rows_args {
  llama_ops_linear_weight weight;
  const int64_t* ids; /* [rows], each from 0 to outputs - 1 */
  float* out;         /* [rows, inputs], integer * scale */
  int64_t rows;
} llama_ops_linear_rows_args;

LLAMA_OPS_API void llama_ops_linear_rows(const llama_ops_linear_rows_args* args);

/* Bytes of a panel's stream for that many inputs. */
LLAMA_OPS_API int64_t llama_ops_linear_panel_bytes(int kind, int64_t inputs);

#endif
