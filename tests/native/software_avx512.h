// AVX-512 without the instructions: what of it csrc/cpu uses, lane by lane, for processors that lack it.
//
// Included before everything else, by -include. Kernels of the levels `avx512` and `emulated` then add
// up in the same order as on a processor that has the instructions, which is what tests of their bits
// and of their errors ask for. Slow.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __AVX512F__ 1
#define __asm__(...)  // empty ones, which name registers that are not there

namespace {  // each level has its own
namespace software {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t UShorts __attribute__((vector_size(64)));
typedef int8_t Chars __attribute__((vector_size(64)));
typedef uint16_t HalfUShorts __attribute__((vector_size(32)));
typedef int8_t QuarterChars __attribute__((vector_size(16)));

template <class V>
inline V read(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
inline void write(void* to, V v) { memcpy(to, &v, sizeof v); }

inline Floats floats(float x) { return x - Floats{}; }
inline Ints ints(int x) { return x + Ints{}; }
inline Shorts shorts(int x) { return static_cast<int16_t>(x) + Shorts{}; }

// Pairs of neighbouring numbers multiplied and added: 16 bits to 32, or unsigned and signed bytes to 16,
// where sums saturate.
inline Ints pairs(Shorts a, Shorts b) {
  Ints sums;
  for (int i = 0; i < 16; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
}
inline Shorts byte_pairs(Chars a, Chars b) {
  Shorts sums;
  for (int i = 0; i < 32; ++i) {
    const int sum = static_cast<uint8_t>(a[2 * i]) * b[2 * i] +
                    static_cast<uint8_t>(a[2 * i + 1]) * b[2 * i + 1];
    sums[i] = static_cast<int16_t>(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return sums;
}

inline Ints ternary(Ints a, Ints b, Ints c, int table) {
  Ints found{};
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return found;
}

inline Floats to_integer(Floats x) { return x + 12582912.0f - 12582912.0f; }

inline Floats times_power(unsigned mask, Floats x, Floats power) {
  const Ints whole = __builtin_convertvector(power, Ints), half = whole >> 1;
  const Floats scaled =
      x * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
  Floats found{};
  for (int i = 0; i < 16; ++i) found[i] = mask >> i & 1 ? scaled[i] : 0.0f;
  return found;
}

inline __mmask16 not_less(Floats a, Floats b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (a[i] < b[i] ? 0u : 1u) << i;
  return static_cast<__mmask16>(mask);
}

inline Floats roots(Floats x) {
  for (int i = 0; i < 16; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

}  // namespace software
}  // namespace

#define SOFT(TYPE, X) ((software::TYPE)(X))
#define _mm512_loadu_si512(P) ((__m512i)software::read<software::Ints>(P))
#define _mm512_load_si512(P) _mm512_loadu_si512(P)
#define _mm512_storeu_si512(P, A) software::write(P, SOFT(Ints, A))
#define _mm512_stream_si512(P, A) software::write(P, SOFT(Ints, A))
#define _mm512_loadu_ps(P) ((__m512)software::read<software::Floats>(P))
#define _mm512_storeu_ps(P, A) software::write(P, SOFT(Floats, A))
#define _mm512_stream_ps(P, A) software::write(P, SOFT(Floats, A))
#define _mm512_castsi512_ps(A) ((__m512)(A))
#define _mm512_cvtepi32_ps(A) \
  ((__m512)__builtin_convertvector(SOFT(Ints, A), software::Floats))
#define _mm512_set1_ps(X) ((__m512)software::floats(X))
#define _mm512_set1_epi32(X) ((__m512i)software::ints(X))
#define _mm512_set1_epi16(X) ((__m512i)software::shorts(X))
#define _mm512_set1_epi8(X) ((__m512i)(static_cast<int8_t>(X) + software::Chars{}))
#define _mm512_add_ps(A, B) ((__m512)(SOFT(Floats, A) + SOFT(Floats, B)))
#define _mm512_fmadd_ps(A, B, C) \
  ((__m512)(SOFT(Floats, A) * SOFT(Floats, B) + SOFT(Floats, C)))
#define _mm512_sqrt_ps(A) ((__m512)software::roots(SOFT(Floats, A)))
#define _mm512_add_epi32(A, B) ((__m512i)(SOFT(Ints, A) + SOFT(Ints, B)))
#define _mm512_add_epi16(A, B) ((__m512i)(SOFT(UShorts, A) + SOFT(UShorts, B)))
#define _mm512_and_si512(A, B) ((__m512i)(SOFT(Ints, A) & SOFT(Ints, B)))
#define _mm512_slli_epi32(A, N) ((__m512i)(SOFT(Ints, A) << (N)))
#define _mm512_slli_epi16(A, N) ((__m512i)(SOFT(Shorts, A) << (N)))
#define _mm512_srai_epi16(A, N) ((__m512i)(SOFT(Shorts, A) >> (N)))
#define _mm512_srli_epi16(A, N) ((__m512i)(SOFT(UShorts, A) >> (N)))
#define _mm512_madd_epi16(A, B) ((__m512i)software::pairs(SOFT(Shorts, A), SOFT(Shorts, B)))
#define _mm512_maddubs_epi16(A, B) ((__m512i)software::byte_pairs(SOFT(Chars, A), SOFT(Chars, B)))
#define _mm512_ternarylogic_epi32(A, B, C, TABLE) \
  ((__m512i)software::ternary(SOFT(Ints, A), SOFT(Ints, B), SOFT(Ints, C), TABLE))
#define _mm512_maskz_cvtepu16_epi32(MASK, A) \
  ((__m512i)__builtin_convertvector(SOFT(HalfUShorts, A), software::Ints))
#define _mm512_maskz_cvtepi8_epi32(MASK, A) \
  ((__m512i)__builtin_convertvector(SOFT(QuarterChars, A), software::Ints))
#define _mm512_maskz_cvtepi32_epi16(MASK, A) \
  ((__m256i)__builtin_convertvector(SOFT(Ints, A), software::HalfUShorts))
#define _mm512_maskz_max_ps(MASK, A, B) \
  ((__m512)(SOFT(Floats, A) > SOFT(Floats, B) ? SOFT(Floats, A) : SOFT(Floats, B)))
#define _mm512_maskz_min_ps(MASK, A, B) \
  ((__m512)(SOFT(Floats, A) < SOFT(Floats, B) ? SOFT(Floats, A) : SOFT(Floats, B)))
#define _mm512_maskz_roundscale_ps(MASK, A, HOW) \
  ((__m512)software::to_integer(SOFT(Floats, A)))
#define _mm512_maskz_scalef_ps(MASK, A, B) \
  ((__m512)software::times_power(MASK, SOFT(Floats, A), SOFT(Floats, B)))
#define _mm512_cmp_ps_mask(A, B, HOW) software::not_less(SOFT(Floats, A), SOFT(Floats, B))
