/* Rotary position embedding (Su et al. 2021): the two halves of a head are the real and imaginary
 * parts of numbers that are turned by angles of their position. */
#ifndef LLAMA_OPS_ROTARY_H
#define LLAMA_OPS_ROTARY_H

#include "llama_ops/common.h"

/* Row r of x takes row (r / repeat) % table_rows of the tables. */
typedef struct llama_ops_rotary_args {
  const void* x;   /* [rows, heads, 2 * half] of dtype */
  const void* cos; /* [table_rows, half] of table_dtype */
  const void* sin; /* [table_rows, half] of table_dtype */
  void* out;       /* [rows, heads, 2 * half] of dtype; may be x */
  int64_t rows;
  int64_t heads;
  int64_t half;
  int64_t table_rows;
  int64_t repeat;
  int inverse; /* turn the other way, as the gradient does */
  int dtype;       /* enum llama_ops_dtype */
  int table_dtype; /* enum llama_ops_dtype */
} llama_ops_rotary_args;

LLAMA_OPS_API void llama_ops_rotary(const llama_ops_rotary_args* args);

#endif
