// Declares each kernel once per instruction set; entries.cc chooses among them at run time.
#pragma once

#include "llama_ops/common.h"

// In a header of csrc/cpu: the functions that csrc/cpu/NAME.cc defines in every level's namespace.
#define LLAMA_OPS_DECLARE(NAME)                                                 \
  namespace llama_ops {                                                         \
  namespace portable { void NAME(const llama_ops_##NAME##_args&); }             \
  namespace avx2 { void NAME(const llama_ops_##NAME##_args&); }                 \
  namespace avx512 { void NAME(const llama_ops_##NAME##_args&); }               \
  namespace avx512_bf16 { void NAME(const llama_ops_##NAME##_args&); }          \
  namespace emulated { void NAME(const llama_ops_##NAME##_args&); }             \
  }

// The C function of a kernel that gains nothing from AVX512_BF16 and is not compiled for it.
#define LLAMA_OPS_ENTRY(NAME)                                                   \
  LLAMA_OPS_DECLARE(NAME)                                                       \
  LLAMA_OPS_API void llama_ops_##NAME(const llama_ops_##NAME##_args* args) {    \
    switch (llama_ops_level()) {                                                \
      case LLAMA_OPS_PORTABLE: return llama_ops::portable::NAME(*args);         \
      case LLAMA_OPS_AVX2: return llama_ops::avx2::NAME(*args);                 \
      default: return llama_ops::avx512::NAME(*args);                           \
    }                                                                           \
  }

// The C function of a kernel that is compiled for every level.
#define LLAMA_OPS_ENTRY_BF16(NAME)                                              \
  LLAMA_OPS_DECLARE(NAME)                                                       \
  LLAMA_OPS_API void llama_ops_##NAME(const llama_ops_##NAME##_args* args) {    \
    switch (llama_ops_level()) {                                                \
      case LLAMA_OPS_PORTABLE: return llama_ops::portable::NAME(*args);         \
      case LLAMA_OPS_AVX2: return llama_ops::avx2::NAME(*args);                 \
      case LLAMA_OPS_AVX512: return llama_ops::avx512::NAME(*args);             \
      case LLAMA_OPS_AVX512_BF16: return llama_ops::avx512_bf16::NAME(*args);   \
      default: return llama_ops::emulated::NAME(*args);                         \
    }                                                                           \
  }
