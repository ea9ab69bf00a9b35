/* What every part of the C interface shares.
 *
 * Each operation is one function `void llama_ops_NAME(const llama_ops_NAME_args*)`. Callers check
 * their input (csrc/paddle does, with readable errors); the kernels trust it. Arrays are contiguous
 * and row-major unless a field says otherwise. Nothing here depends on Paddle.
 */
#ifndef LLAMA_OPS_COMMON_H
#define LLAMA_OPS_COMMON_H

#include <stdint.h>

#ifdef __cplusplus
#define LLAMA_OPS_API extern "C" __attribute__((visibility("default")))
#else
#define LLAMA_OPS_API
#endif

/* How numbers lie in memory; arithmetic is in float32 whatever the storage. */
enum llama_ops_dtype {
  LLAMA_OPS_F32 = 0,
  LLAMA_OPS_BF16 = 1,
  LLAMA_OPS_F16 = 2,
  LLAMA_OPS_I8 = 3 /* of caches alone */
};

/* Instruction sets, each a copy of all kernels. EMULATED is AVX512_BF16 with its dot products written
 * out in plain AVX-512, so that its kernels can be tested on processors without them; it is never
 * chosen unless it is asked for. */
enum llama_ops_level {
  LLAMA_OPS_PORTABLE = 0,
  LLAMA_OPS_AVX2 = 1,        /* AVX2, FMA, F16C */
  LLAMA_OPS_AVX512 = 2,      /* F, BW, VL, DQ */
  LLAMA_OPS_AVX512_BF16 = 3, /* and BF16, VNNI */
  LLAMA_OPS_EMULATED = 4
};

/* The highest level that this library has and this processor supports, EMULATED aside. */
LLAMA_OPS_API int llama_ops_highest_level(void);

/* The level in use: the highest, or what LLAMA_OPS_LEVEL in the environment names
 * (portable, avx2, avx512, avx512_bf16, emulated), or what llama_ops_set_level chose. */
LLAMA_OPS_API int llama_ops_level(void);

/* Choose a level for this process; returns 0, or -1 where library or processor lack it. */
LLAMA_OPS_API int llama_ops_set_level(int level);

#endif
