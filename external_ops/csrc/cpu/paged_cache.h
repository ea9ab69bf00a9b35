// Heads of keys and values on their way into the cache and out of it.
#pragma once

#include "cpu/rounding.h"
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

// Integers of the cache have a scale, which lies behind those of each head.
template <class T>
constexpr bool kScaled = false;
template <>
constexpr bool kScaled<int8_t> = true;

// Numbers from one head in the cache to the next.
template <class T>
constexpr int64_t stored(int64_t dim) {
  return dim + (kScaled<T> ? LLAMA_OPS_SCALE_BYTES : 0);
}

inline float scale_behind(const int8_t* head, int64_t dim) {
  float scale;
  memcpy(&scale, head + dim, sizeof scale);
  return scale;
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

// Enters one head; `buffer` has room for it.
template <class T>
inline void write_head(const float* from, int64_t dim, float*, T* to) { copy_narrow(from, dim, to); }
inline void write_head(const float* from, int64_t dim, float* buffer, int8_t* to) {
  const float scale = rounding_scale(from, dim);
  round_row(from, dim, scale, buffer);
  for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<int8_t>(buffer[i]);
  memcpy(to + dim, &scale, sizeof scale);
}

// Enters the key and the value of one token, or clears the output of padding.
template <class T>
inline void write_token(const llama_ops_paged_attention_args& a, int64_t token, float* buffer) {
  const int64_t position = a.position[token], sequence = a.sequence[token], half = a.dim / 2;
  if (position < 0 || sequence < 0) {
    memset(a.out + token * a.heads * a.dim, 0, a.heads * a.dim * sizeof(float));
    return;
  }
  const int64_t number = a.block_table[sequence * a.table_width + position / a.block];
  const int64_t head = stored<T>(a.dim);
  const int64_t slot = (number * a.block + position % a.block) * a.groups * head;
  for (int64_t group = 0; group < a.groups; ++group) {
    const float* k = a.k + token * a.k_stride + group * a.dim;
    if (a.cos != nullptr) {
      turn_head(k, a.cos + token * half, a.sin + token * half, half, buffer);
      k = buffer;
    }
    write_head(k, a.dim, buffer, static_cast<T*>(a.k_cache) + slot + group * head);
    const float* v = a.v + token * a.v_stride + group * a.dim;
    write_head(v, a.dim, buffer, static_cast<T*>(a.v_cache) + slot + group * head);
  }
}

}  // namespace paged
}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
