// Vectors of float32 for kernels that are compiled once per instruction set.
//
// Level code (csrc/cpu/*.cc but entries.cc) lives in namespace llama_ops::LLAMA_OPS_LEVEL and uses
// no templates or inline functions of the standard library: the linker would keep one copy of them
// for all levels, perhaps one that this processor cannot run. setup.py checks that.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "llama_ops/common.h"

#if defined(__AVX512F__)
#define LLAMA_OPS_WIDTH 16
#elif defined(__AVX2__)
#define LLAMA_OPS_WIDTH 8
#else
#define LLAMA_OPS_WIDTH 4
#endif

// The level whose copy of a kernel serves this one too, where AVX512_BF16 gains it nothing: level
// headers declare such kernels in this namespace, and callers name it (LLAMA_OPS_BASE::rotary_part).
#if defined(__AVX512BF16__) || defined(LLAMA_OPS_EMULATE)
#define LLAMA_OPS_BASE avx512
#else
#define LLAMA_OPS_BASE LLAMA_OPS_LEVEL
#endif

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kWidth = LLAMA_OPS_WIDTH;  // float32 numbers in a vector

// Products and sums of these contract to fused multiply-adds (-ffp-contract=fast).
typedef float Vec __attribute__((vector_size(4 * LLAMA_OPS_WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * LLAMA_OPS_WIDTH)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LLAMA_OPS_WIDTH)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LLAMA_OPS_WIDTH)));
typedef int8_t ByteVec __attribute__((vector_size(LLAMA_OPS_WIDTH)));

struct bf16 {
  uint16_t bits;
};

template <class T>
inline T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
inline T larger(T a, T b) { return a < b ? b : a; }

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return static_cast<float>(x); }
inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

// Less zero: that is x itself, even -0, so no instruction is left of it (Vec{} + x would be one).
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  memcpy(&x, from, sizeof x);
  return x;
}
// Written out where the compiler makes several shuffles of a conversion.
inline Vec load(const bf16* from) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vec)((BitVec)_mm512_maskz_cvtepu16_epi32(0xffff, half) << 16);
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Vec)((BitVec)_mm256_cvtepu16_epi32(half) << 16);
#else
  HalfVec half;
  memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, BitVec) << 16);
#endif
}

inline IntVec load_bytes(const int8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (IntVec)_mm512_maskz_cvtepi8_epi32(0xffff, bytes);
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  ByteVec bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
#endif
}
inline Vec load(const int8_t* from) { return __builtin_convertvector(load_bytes(from), Vec); }

inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }
inline void store(bf16* to, Vec x) {
  BitVec bits = (BitVec)x;
  BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  BitVec quiet = (bits >> 16) | 0x40u;
  BitVec chosen = x != x ? quiet : rounded;
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)chosen);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);
  const __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8));
#else
  const HalfVec half = __builtin_convertvector(chosen, HalfVec);
#endif
  memcpy(to, &half, sizeof half);
}

// The first `count` (less than kWidth) numbers; the rest of the vector is zero.
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  float numbers[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = widen(from[i]);
  return load(numbers);
}
template <class T>
inline void store_some(T* to, Vec x, int64_t count) {
  float numbers[kWidth];
  store(numbers, x);
  for (int64_t i = 0; i < count; ++i) narrow(numbers[i], to + i);
}

// Stores past the caches, for results too large to stay in them; `to` is aligned to the bytes that
// are stored. Other threads see them once `fence` was called.
inline void stream(float* to, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(to, (__m128)x);
#else
  store(to, x);
#endif
}
inline void stream(bf16* to, Vec x) {
#if defined(__AVX512F__)
  __m256i half;
  store(reinterpret_cast<bf16*>(&half), x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), half);
#elif defined(__AVX2__)
  __m128i half;
  store(reinterpret_cast<bf16*>(&half), x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), half);
#else
  store(to, x);
#endif
}
inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
  float numbers[kWidth];
  store(numbers, x);
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) numbers[i] += numbers[i + width];
  }
  return numbers[0];
}
inline float largest(Vec x) {
  float numbers[kWidth];
  store(numbers, x);
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) numbers[i] = larger(numbers[i], numbers[i + width]);
  }
  return numbers[0];
}

// e^x with a relative error below 2e-7; 0 below -87.3, infinity above 88.7. Cody-Waite reduction by
// ln 2 and a minimax polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes' expf).
inline __attribute__((always_inline)) Vec exp(Vec x) {
#if defined(__AVX512F__)
  // Of a NaN and a limit these two return the second, so that NaN goes through.
  // (The unmasked intrinsics make GCC 12 warn of values that it thinks are not initialised.)
  const __mmask16 all = 0xffff;
  Vec clipped = (Vec)_mm512_maskz_max_ps(all, _mm512_set1_ps(-87.3f), (__m512)x);
  clipped = (Vec)_mm512_maskz_min_ps(all, _mm512_set1_ps(89.0f), (__m512)clipped);
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(all, (__m512)(clipped * 1.44269504f), 0);
#else
  Vec clipped = x < -87.3f ? splat(-87.3f) : x;
  clipped = clipped > 88.7f ? splat(88.7f) : clipped;
  const float to_nearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clipped * 1.44269504f + to_nearest;
  const Vec n = shifted - to_nearest;
#endif
  Vec r = clipped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  const IntVec whole = __builtin_convertvector(n, IntVec);
  // In two factors, since 2^128 is no float.
  const IntVec half = whole >> 1;
  const Vec low = (Vec)((half + 127) << 23), high = (Vec)((whole - half + 127) << 23);
  Vec result = p * low * high;
  result = x < -87.3f ? Vec{} : result;
  result = x > 88.7f ? splat(INFINITY) : result;
  return x != x ? x : result;
#endif
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
