// Declares each kernel once per instruction set; entries.cc chooses among them at run time.
#pragma once

#include "llama_ops/common.h"

// In entries.cc: the functions that csrc/cpu/NAME.cc defines in every level's namespace.
#define LLAMA_OPS_DECLARE(NAME)                                                 \
  namespace llama_ops {                                                         \
  namespace portable { void NAME(const llama_ops_##NAME##_args&); }             \
  namespace avx2 { void NAME(const llama_ops_##NAME##_args&); }                 \
  namespace avx512 { void NAME(const llama_ops_##NAME##_args&); }               \
  namespace avx512_bf16 { void NAME(const llama_ops_##NAME##_args&); }          \
  namespace emulated { void NAME(const llama_ops_##NAME##_args&); }             \
  }

// A library may lack levels (LLAMA_OPS_LEVELS in external_ops/building.py).
#if defined(LLAMA_OPS_BUILT_AVX2)
#define LLAMA_OPS_IF_AVX2(...) __VA_ARGS__
#else
#define LLAMA_OPS_IF_AVX2(...)
#endif
#if defined(LLAMA_OPS_BUILT_AVX512)
#define LLAMA_OPS_IF_AVX512(...) __VA_ARGS__
#else
#define LLAMA_OPS_IF_AVX512(...)
#endif
#if defined(LLAMA_OPS_BUILT_AVX512_BF16)
#define LLAMA_OPS_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define LLAMA_OPS_IF_AVX512_BF16(...)
#endif
#if defined(LLAMA_OPS_BUILT_EMULATED)
#define LLAMA_OPS_IF_EMULATED(...) __VA_ARGS__
#else
#define LLAMA_OPS_IF_EMULATED(...)
#endif

// `return` of a call in the namespace of the level in use. THREE is for kernels that gain nothing from
// AVX512_BF16 and are not compiled for it, FIVE for the others.
#define LLAMA_OPS_RETURN_THREE(CALL)                                                              \
  switch (llama_ops_level()) {                                                                    \
    LLAMA_OPS_IF_AVX2(case LLAMA_OPS_AVX2 : return llama_ops::avx2::CALL;)                        \
    LLAMA_OPS_IF_AVX512(case LLAMA_OPS_AVX512 : case LLAMA_OPS_AVX512_BF16 :                      \
                        case LLAMA_OPS_EMULATED : return llama_ops::avx512::CALL;)                \
    default: return llama_ops::portable::CALL;                                                    \
  }
#define LLAMA_OPS_RETURN_FIVE(CALL)                                                               \
  switch (llama_ops_level()) {                                                                    \
    LLAMA_OPS_IF_AVX2(case LLAMA_OPS_AVX2 : return llama_ops::avx2::CALL;)                        \
    LLAMA_OPS_IF_AVX512(case LLAMA_OPS_AVX512 : return llama_ops::avx512::CALL;)                  \
    LLAMA_OPS_IF_AVX512_BF16(case LLAMA_OPS_AVX512_BF16 : return llama_ops::avx512_bf16::CALL;)   \
    LLAMA_OPS_IF_EMULATED(case LLAMA_OPS_EMULATED : return llama_ops::emulated::CALL;)            \
    default: return llama_ops::portable::CALL;                                                    \
  }

// The C function of a kernel that is compiled for three levels, or for all five.
#define LLAMA_OPS_ENTRY(NAME)                                                                     \
  LLAMA_OPS_DECLARE(NAME)                                                                         \
  LLAMA_OPS_API void llama_ops_##NAME(const llama_ops_##NAME##_args* args) {                      \
    LLAMA_OPS_RETURN_THREE(NAME(*args))                                                           \
  }
#define LLAMA_OPS_ENTRY_BF16(NAME)                                                                \
  LLAMA_OPS_DECLARE(NAME)                                                                         \
  LLAMA_OPS_API void llama_ops_##NAME(const llama_ops_##NAME##_args* args) {                      \
    LLAMA_OPS_RETURN_FIVE(NAME(*args))                                                            \
  }
