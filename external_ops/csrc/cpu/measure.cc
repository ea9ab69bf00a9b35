// What the machine can do; see llama_ops/measure.h.
#include "llama_ops/measure.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

// A multiple of eight vectors of any level.
constexpr int64_t kBlock = 512;
// Enough to hide the latency of a multiply-add, and few enough for 16 registers.
constexpr int kSums = 12;

BitVec load_bits(const char* from) {
  BitVec bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

// Where asking ahead is faster, as kernels that stream weights do (cpu/linear_float.h).
constexpr int64_t kAhead = 4096;

template <bool kAsk>
void read_part(const llama_ops_measure_read_args& a, int thread, int threads) {
  const Range bytes = share(a.bytes, kBlock, thread, threads);
  const char* from = static_cast<const char*>(a.from);
  BitVec sums[8] = {};
  constexpr int64_t step = sizeof(BitVec);
  for (int64_t i = bytes.begin; i < bytes.end; i += 8 * step) {
    for (int64_t j = 0; j < 8 * step && kAsk; j += 64) __builtin_prefetch(from + i + j + kAhead);
    for (int j = 0; j < 8; ++j) sums[j] += load_bits(from + i + j * step);
  }
  uint32_t words[kWidth], total = 0;
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  memcpy(words, sums, sizeof words);
  for (int j = 0; j < kWidth; ++j) total += words[j];
  __atomic_fetch_add(a.sum, total, __ATOMIC_RELAXED);
}

void copy_part(const llama_ops_measure_copy_args& a, int thread, int threads) {
  const Range bytes = share(a.bytes, kBlock, thread, threads);
  const char* from = static_cast<const char*>(a.from);
  char* to = static_cast<char*>(a.to);
#if defined(__AVX512F__)
  if (a.streaming) {
    for (int64_t i = bytes.begin; i < bytes.end; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
    }
    _mm_sfence();
    return;
  }
#endif
  memcpy(to + bytes.begin, from + bytes.begin, bytes.end - bytes.begin);
}

float multiply_part(int64_t rounds) {
  // Unrolled by decree, or the sums would lie in memory, whose latency would be measured.
  Vec sums[kSums];
#pragma GCC unroll 12
  for (int j = 0; j < kSums; ++j) sums[j] = splat(0.001f * static_cast<float>(j));
  // Runs into a fixed point: neither infinite nor denormal, which would take longer.
  const Vec factor = splat(0.5f), summand = splat(0.25f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * factor + summand;
  }
#pragma GCC unroll 12
  for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
  return sum(sums[0]);
}

}  // namespace

void measure_read(const llama_ops_measure_read_args& a) {
  *a.sum = 0;
  on_threads(a.bytes, [&](int thread, int threads) {
    a.ahead ? read_part<true>(a, thread, threads) : read_part<false>(a, thread, threads);
  });
}

void measure_copy(const llama_ops_measure_copy_args& a) {
  on_threads(a.bytes, [&](int thread, int threads) { copy_part(a, thread, threads); });
}

void measure_fma(const llama_ops_measure_fma_args& a) {
  on_threads(INT64_MAX, [&](int thread, int threads) {
    const float result = multiply_part(a.rounds);
    if (thread == 0) {
      *a.result = result;
      *a.operations = int64_t{2} * kSums * kWidth * a.rounds * threads;
    }
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
