// Linears with packed weights; see llama_ops/linear.h and cpu/linear.h.
#include "cpu/linear.h"

#include "cpu/linear_dot.h"
#include "cpu/linear_float.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where linear_prepare_part puts what linear_part reads.
struct Prepared {
  float* x;          // tiles [depth, rows of the tile], one after another
  float* row_scale;  // [rows] where rows are rounded, else null
};

Prepared prepared_of(const llama_ops_linear_args& a) {
  float* x = static_cast<float*>(a.prepared);
  if (!rounds_rows(a.weight.kind)) return {x, nullptr};
  return {x, x + aligned(a.rows * padded(a.weight.inputs) * 4) / 4};
}

// The scale of a row rounded to 8 bits: its largest number becomes 127. NaN where one is not finite.
float scale_of(const float* x, int64_t size) {
  const int64_t whole = size / kWidth * kWidth;
  // As integers, since that order also puts infinity and NaN above all numbers.
  BitVec most = (BitVec)load_some(x + whole, size - whole) & 0x7fffffffu;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const BitVec bits = (BitVec)load(x + i) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t bits[kWidth], top = 0;
  memcpy(bits, &most, sizeof most);
  for (int i = 0; i < kWidth; ++i) top = larger(top, bits[i]);
  if (top >= 0x7f800000u) return NAN;
  float largest;
  memcpy(&largest, &top, 4);
  return larger(largest / 127.0f, 1e-30f);
}

// The integers of a row, still in float32: x / scale to the nearest, ties to even. Infinity and NaN
// become 0; the row's scale is NaN then.
void round_row(const float* x, int64_t size, float scale, float* to) {
  const float to_nearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float divisor = scale == scale ? scale : INFINITY;
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Vec rounded = load(x + i) / divisor + to_nearest - to_nearest;
    store(to + i, rounded == rounded ? rounded : Vec{});
  }
  for (; i < size; ++i) {
    const float rounded = x[i] / divisor + to_nearest - to_nearest;
    to[i] = rounded == rounded ? rounded : 0.0f;
  }
}

// Copies a row to every `step`-th place, filled up with zeros to `depth`.
void place_row(const float* x, int64_t size, int64_t depth, int64_t step, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i * step] = x[i];
  for (int64_t i = size; i < depth; ++i) to[i * step] = 0.0f;
}

void prepare_row(const llama_ops_linear_args& a, int64_t row, int64_t step, float* to,
                 float* row_scale) {
  const int64_t size = a.weight.inputs, depth = padded(size);
  const float* x = a.x + row * size;
  if (row_scale != nullptr) {
    row_scale[row] = scale_of(x, size);
    float* rounded = step == 1 ? to : static_cast<float*>(scratch(kLinearScratch, depth * 4));
    round_row(x, size, row_scale[row], rounded);
    x = rounded;
  }
  place_row(x, size, depth, step, to);
}

#if defined(__AVX512F__)
void prepare_dots(const llama_ops_linear_args& a, int thread, int threads) {
  const DotPrepared p = dot_prepared(a);
  const Tiles tiles = dot_tiles(a.rows);
  const Range mine = share(tiles.count, 1, thread, threads);
  const int64_t size = a.weight.inputs;
  for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
    const int64_t first = tiles.begin(tile), rows = tiles.size(tile);
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = a.x + (first + r) * size;
      int32_t* words = p.words + first * p.row_words + r;
      if (p.row_scale == nullptr) {
        place_halves(x, size, rows, p, words);
        continue;
      }
      float* rounded = static_cast<float*>(scratch(kLinearScratch, size * 4 + padded(size)));
      p.row_scale[first + r] = scale_of(x, size);
      round_row(x, size, p.row_scale[first + r], rounded);
      place_bytes(rounded, size, rows, p, a.weight.kind == LLAMA_OPS_LINEAR_INT4, words,
                  p.zeros + first * p.row_zeros + r);
    }
  }
}
#endif

template <class W>
void panels_of(const llama_ops_linear_args& a, int thread, int threads) {
  const Prepared p = prepared_of(a);
  const bool exact = p.row_scale != nullptr && a.weight.groups == 1;
  if (a.rows <= kStreamRows) {
    exact ? stream_panels<W, int32_t>(a, p.x, p.row_scale, thread, threads)
          : stream_panels<W, float>(a, p.x, p.row_scale, thread, threads);
  } else {
    exact ? block_panels<W, int32_t>(a, p.x, p.row_scale, thread, threads, kLinearScratch)
          : block_panels<W, float>(a, p.x, p.row_scale, thread, threads, kLinearScratch);
  }
}

}  // namespace

int64_t linear_prepared_bytes(const llama_ops_linear_weight& weight, int64_t rows) {
  // Dot products take less.
  return aligned(rows * padded(weight.inputs) * 4) + aligned(rows * 4);
}

void linear_prepare_part(const llama_ops_linear_args& a, int thread, int threads) {
#if defined(__AVX512F__)
  if (uses_dots(a.weight)) return prepare_dots(a, thread, threads);
#endif
  const Prepared p = prepared_of(a);
  const int64_t depth = padded(a.weight.inputs);
  const Tiles tiles = tiles_of(a.rows);
  const Range mine = share(tiles.count, 1, thread, threads);
  for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
    const int64_t first = tiles.begin(tile), size = tiles.size(tile);
    for (int64_t r = 0; r < size; ++r) {
      prepare_row(a, first + r, size, p.x + first * depth + r, p.row_scale);
    }
  }
}

void linear_part(const llama_ops_linear_args& a, int thread, int threads) {
#if defined(__AVX512F__)
  if (uses_dots(a.weight)) return dot_part(a, thread, threads);
#endif
  switch (a.weight.kind) {
    case LLAMA_OPS_LINEAR_F32: return panels_of<WideWeights>(a, thread, threads);
    case LLAMA_OPS_LINEAR_BF16: return panels_of<Bf16Weights>(a, thread, threads);
    case LLAMA_OPS_LINEAR_INT8:
    case LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY: return panels_of<Int8Weights>(a, thread, threads);
    default: return panels_of<Int4Weights>(a, thread, threads);
  }
}

void linear(const llama_ops_linear_args& given) {
  llama_ops_linear_args a = given;
  if (a.rows == 0 || a.weight.outputs == 0) return;
  a.prepared = scratch(kLinearPrepared, linear_prepared_bytes(a.weight, a.rows));
  const int64_t work = a.rows * a.weight.outputs * a.weight.inputs / kWidth;
  on_threads(work, [&](int thread, int threads) {
    linear_prepare_part(a, thread, threads);
    if (threads > 1) {
#pragma omp barrier
    }
    linear_part(a, thread, threads);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
