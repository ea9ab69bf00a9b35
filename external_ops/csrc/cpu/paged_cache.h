// Heads of keys and values on their way into the cache and out of it.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/paged_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {
namespace paged {

// Turns a head by its position's angles: the halves are real and imaginary parts.
inline void turn_head(const float* x, const float* cos, const float* sin, int64_t half,
                      float* out) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Vec real = load(x + i), imaginary = load(x + half + i);
    const Vec c = load(cos + i), s = load(sin + i);
    store(out + i, real * c - imaginary * s);
    store(out + half + i, imaginary * c + real * s);
  }
  for (; i < half; ++i) {
    const float real = x[i], imaginary = x[half + i];
    out[i] = real * cos[i] - imaginary * sin[i];
    out[half + i] = imaginary * cos[i] + real * sin[i];
  }
}

template <class T>
inline void copy_narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  for (; i < count; ++i) narrow(from[i], to + i);
}

template <class T>
inline void copy_wide(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load_some(from + i, count - i));
}

// Enters the key and the value of one token, or clears the output of padding.
template <class T>
inline void write_token(const llama_ops_paged_attention_args& a, int64_t token, float* turned) {
  const int64_t position = a.position[token], sequence = a.sequence[token], half = a.dim / 2;
  if (position < 0 || sequence < 0) {
    memset(a.out + token * a.heads * a.dim, 0, a.heads * a.dim * sizeof(float));
    return;
  }
  const int64_t number = a.block_table[sequence * a.table_width + position / a.block];
  const int64_t size = a.groups * a.dim, slot = (number * a.block + position % a.block) * size;
  T* k_cache = static_cast<T*>(a.k_cache) + slot;
  T* v_cache = static_cast<T*>(a.v_cache) + slot;
  const float* k = a.k + token * a.k_stride;
  if (a.cos != nullptr) {
    for (int64_t group = 0; group < a.groups; ++group) {
      turn_head(k + group * a.dim, a.cos + token * half, a.sin + token * half, half, turned);
      copy_narrow(turned, a.dim, k_cache + group * a.dim);
    }
  } else {
    copy_narrow(k, size, k_cache);
  }
  copy_narrow(a.v + token * a.v_stride, size, v_cache);
}

}  // namespace paged
}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
