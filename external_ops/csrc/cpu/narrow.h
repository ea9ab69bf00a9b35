// Vectors of narrow integers and what multiplies them, under one name for AVX2 and AVX-512.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX2__)

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

#if defined(__AVX512F__)
typedef __m512i Narrow;  // of bytes, or of integers of 16 or 32 bits
inline Narrow load_narrow(const void* from) { return _mm512_loadu_si512(from); }
inline void store_narrow(void* to, Narrow a) { _mm512_storeu_si512(to, a); }
inline Vec floats_of(Narrow a) { return (Vec)_mm512_cvtepi32_ps(a); }
inline Narrow all_words(int32_t x) { return _mm512_set1_epi32(x); }
inline Narrow all_shorts(int16_t x) { return _mm512_set1_epi16(x); }
inline Narrow both(Narrow a, Narrow b) { return _mm512_and_si512(a, b); }
template <int N>
inline Narrow shorts_right(Narrow a) { return _mm512_srli_epi16(a, N); }
inline Narrow add_words(Narrow a, Narrow b) { return _mm512_add_epi32(a, b); }
inline Narrow add_shorts(Narrow a, Narrow b) { return _mm512_add_epi16(a, b); }
inline Narrow pairs_of_shorts(Narrow a, Narrow b) { return _mm512_madd_epi16(a, b); }
inline Narrow pairs_of_bytes(Narrow unsigned_w, Narrow signed_x) {
  return _mm512_maddubs_epi16(unsigned_w, signed_x);
}
#else
typedef __m256i Narrow;
inline Narrow load_narrow(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store_narrow(void* to, Narrow a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
inline Vec floats_of(Narrow a) { return (Vec)_mm256_cvtepi32_ps(a); }
inline Narrow all_words(int32_t x) { return _mm256_set1_epi32(x); }
inline Narrow all_shorts(int16_t x) { return _mm256_set1_epi16(x); }
inline Narrow both(Narrow a, Narrow b) { return _mm256_and_si256(a, b); }
template <int N>
inline Narrow shorts_right(Narrow a) { return _mm256_srli_epi16(a, N); }
inline Narrow add_words(Narrow a, Narrow b) { return _mm256_add_epi32(a, b); }
inline Narrow add_shorts(Narrow a, Narrow b) { return _mm256_add_epi16(a, b); }
inline Narrow pairs_of_shorts(Narrow a, Narrow b) { return _mm256_madd_epi16(a, b); }
inline Narrow pairs_of_bytes(Narrow unsigned_w, Narrow signed_x) {
  return _mm256_maddubs_epi16(unsigned_w, signed_x);
}
#endif
// Else the compiler would add up two words' products first and run out of registers, or copy sums.
inline __attribute__((always_inline)) Narrow in_register(Narrow sum) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(sum));
#else
  __asm__("" : "+x"(sum));
#endif
  return sum;
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops

#endif  // __AVX2__
