// The C interface on CPUs: what the processor supports, and each kernel by its level.
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch.h"
#include "llama_ops/adamw.h"
#include "llama_ops/cross_entropy.h"
#include "llama_ops/flash_attention.h"
#include "llama_ops/decoder.h"
#include "llama_ops/frozen_matmul.h"
#include "llama_ops/linear.h"
#include "llama_ops/low_rank.h"
#include "llama_ops/measure.h"
#include "llama_ops/paged_attention.h"
#include "llama_ops/rms_norm.h"
#include "llama_ops/rotary.h"
#include "llama_ops/sample.h"
#include "llama_ops/swiglu.h"

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "emulated"};

// Whether this library has a level and this processor can run it.
bool supports(int level) {
  switch (level) {
    case LLAMA_OPS_PORTABLE:
      return true;
#if defined(LLAMA_OPS_BUILT_AVX2)
    case LLAMA_OPS_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(LLAMA_OPS_BUILT_AVX512)
    case LLAMA_OPS_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#if defined(LLAMA_OPS_BUILT_AVX512_BF16)
    case LLAMA_OPS_AVX512_BF16:
      return supports(LLAMA_OPS_AVX512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
#endif
#if defined(LLAMA_OPS_BUILT_EMULATED)
    case LLAMA_OPS_EMULATED:
      return supports(LLAMA_OPS_AVX512);
#endif
    default:
      return false;
  }
}

int first_level() {
  if (const char* name = std::getenv("LLAMA_OPS_LEVEL")) {
    for (int level = 0; level <= LLAMA_OPS_EMULATED; ++level) {
      if (std::strcmp(name, kNames[level]) == 0 && supports(level)) return level;
    }
  }
  return llama_ops_highest_level();
}

int& current() {
  static int level = first_level();
  return level;
}

}  // namespace

int llama_ops_highest_level(void) {
  int level = LLAMA_OPS_AVX512_BF16;
  while (!supports(level)) --level;
  return level;
}

int llama_ops_level(void) { return current(); }

int llama_ops_set_level(int level) {
  if (!supports(level)) return -1;
  current() = level;
  return 0;
}

LLAMA_OPS_ENTRY(rms_norm_forward)
LLAMA_OPS_ENTRY(rms_norm_backward)
LLAMA_OPS_ENTRY(rotary)
LLAMA_OPS_ENTRY(swiglu_forward)
LLAMA_OPS_ENTRY(swiglu_backward)
LLAMA_OPS_ENTRY(paged_attention)
LLAMA_OPS_ENTRY(flash_attention_forward)
LLAMA_OPS_ENTRY(flash_attention_backward)
LLAMA_OPS_ENTRY_BF16(linear)
LLAMA_OPS_ENTRY_BF16(decoder)
LLAMA_OPS_ENTRY(low_rank)
LLAMA_OPS_ENTRY(frozen_matmul)
LLAMA_OPS_ENTRY(cross_entropy_statistics)
LLAMA_OPS_ENTRY(cross_entropy_residual)
LLAMA_OPS_ENTRY(sample)
LLAMA_OPS_ENTRY(adamw)
LLAMA_OPS_ENTRY(squares)
LLAMA_OPS_ENTRY(measure_read)
LLAMA_OPS_ENTRY(measure_copy)
LLAMA_OPS_ENTRY(measure_fma)
