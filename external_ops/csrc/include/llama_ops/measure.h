/* What the machine can do, as bounds for the other kernels: they do nothing but load, copy or
 * multiply, on as many threads as those use. The caller takes the time. */
#ifndef LLAMA_OPS_MEASURE_H
#define LLAMA_OPS_MEASURE_H

#include "llama_ops/common.h"

/* Loads every byte once. */
typedef struct llama_ops_measure_read_args {
  const void* from; /* [bytes] */
  int64_t bytes;    /* a multiple of 512 */
  uint32_t* sum;    /* [1]: of all 32-bit words; so that nothing is left out */
  int ahead;        /* ask for bytes 4 KiB before they are loaded */
} llama_ops_measure_read_args;

LLAMA_OPS_API void llama_ops_measure_read(const llama_ops_measure_read_args* args);

/* Loads and stores every byte once. */
typedef struct llama_ops_measure_copy_args {
  const void* from; /* [bytes], 64-byte aligned */
  void* to;         /* [bytes], 64-byte aligned */
  int64_t bytes;    /* a multiple of 512 */
  int streaming;    /* store past the caches, which then need not load `to` first; needs AVX-512,
                     * and is an ordinary copy elsewhere */
} llama_ops_measure_copy_args;

LLAMA_OPS_API void llama_ops_measure_copy(const llama_ops_measure_copy_args* args);

/* Multiplies and adds float32 vectors in registers. */
typedef struct llama_ops_measure_fma_args {
  int64_t rounds;      /* on each thread */
  float* result;       /* [1]: so that nothing is left out */
  int64_t* operations; /* [1], written: multiplications and additions by all threads together */
} llama_ops_measure_fma_args;

LLAMA_OPS_API void llama_ops_measure_fma(const llama_ops_measure_fma_args* args);

#endif
