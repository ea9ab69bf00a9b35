// Linears with packed weights; see llama_ops/linear.h and cpu/linear.h.
#include "cpu/linear.h"

#include "cpu/linear_dot.h"
#include "cpu/linear_float.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
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

// Inputs [begin, end) of a row, rounded where `scale` is not null, zero beyond its size. `buffer` is
// used where they do not lie in x like that.
const float* segment(const llama_ops_linear_args& a, int64_t row, int64_t begin, int64_t end,
                     const float* scale, float* buffer) {
  const int64_t size = a.weight.inputs, there = smaller(end, size) - begin;
  const float* x = a.x + row * size + begin;
  if (scale == nullptr && there == end - begin) return x;
  if (scale == nullptr) {
    memcpy(buffer, x, there * sizeof *x);
  } else {
    round_row(x, there, *scale, buffer);
  }
  for (int64_t i = there; i < end - begin; ++i) buffer[i] = 0.0f;
  return buffer;
}

// Two integers in 16 bits each.
int32_t pair_of(float low, float high) {
  return static_cast<int32_t>((static_cast<uint32_t>(static_cast<int32_t>(low)) & 0xffffu) |
                              static_cast<uint32_t>(static_cast<int32_t>(high)) << 16);
}

// Calls place(numbers, tile, row of the tile, begin, count) for this thread's share of x, which is cut
// into tiles and these into blocks of inputs: there may be one tile only. Writes row_scale unless null.
template <class Place>
void prepare_tiles(const llama_ops_linear_args& a, const Tiles& tiles, float* row_scale, int thread,
                   int threads, const Place& place) {
  const int64_t depth = padded(a.weight.inputs);
  const int64_t blocks = (depth + kPrepareInputs - 1) / kPrepareInputs;
  const Range mine = share(tiles.count * blocks, 1, thread, threads);
  float scale[kTileRows], buffer[kPrepareInputs];
  for (int64_t item = mine.begin; item < mine.end; ++item) {
    const int64_t tile = item / blocks, begin = item % blocks * kPrepareInputs;
    const int64_t end = smaller(begin + kPrepareInputs, depth), first = tiles.begin(tile);
    for (int r = 0; r < tiles.size(tile); ++r) {
      if (row_scale != nullptr && (item == mine.begin || begin == 0)) {
        scale[r] = rounding_scale(a.x + (first + r) * a.weight.inputs, a.weight.inputs);
        if (begin == 0) row_scale[first + r] = scale[r];
      }
      const float* by = row_scale == nullptr ? nullptr : scale + r;
      place(segment(a, first + r, begin, end, by, buffer), tile, r, begin, end - begin);
    }
  }
}

#if defined(__AVX2__)
void prepare_dots(const llama_ops_linear_args& a, int thread, int threads) {
  const DotPrepared p = dot_prepared(a);
  const Tiles tiles = dot_tiles(a.rows);
  const bool four = a.weight.kind == LLAMA_OPS_LINEAR_INT4;
  const int64_t depth = padded(a.weight.inputs), per_word = depth / p.row_words;
  const int64_t chunk = four ? 8 * Int4Dot::kChunk : 4 * Int8Dot::kChunk;
  prepare_tiles(a, tiles, p.row_scale, thread, threads,
                [&](const float* x, int64_t tile, int r, int64_t begin, int64_t count) {
    const int64_t first = tiles.begin(tile), rows = tiles.size(tile);
    int32_t* words = p.words + first * p.row_words + begin / per_word * rows + r;
    if (p.row_scale == nullptr) return place_halves(x, count, rows, words);
    int32_t* zeros = p.zeros + first * p.row_zeros + begin / chunk * rows + r;
    place_bytes(x, count, rows, four, words, zeros);
  });
}
#endif

template <class W, bool kScaled, class T>
void blocks_of_pairs(const llama_ops_linear_args& a, const Prepared& p, int thread, int threads) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (W::kIntegers) {
    const int32_t* x = reinterpret_cast<const int32_t*>(p.x);
    block_panels<W, kScaled, T>(a, x, p.row_scale, thread, threads, kLinearScratch);
  }
#endif
}

template <class W, bool kScaled, class T>
void panels_with(const llama_ops_linear_args& a, const Prepared& p, int thread, int threads) {
  if (a.rows <= kStreamRows) {
    stream_panels<W, kScaled, T>(a, p.x, p.row_scale, thread, threads);
  } else if (!in_pairs(a)) {
    block_panels<W, kScaled, T>(a, p.x, p.row_scale, thread, threads, kLinearScratch);
  } else {
    blocks_of_pairs<W, kScaled, T>(a, p, thread, threads);
  }
}

template <class W>
void panels_of(const llama_ops_linear_args& a, int thread, int threads) {
  const Prepared p = prepared_of(a);
  if constexpr (W::kIntegers) {
    if (a.weight.groups > 1) return panels_with<W, true, float>(a, p, thread, threads);
    if (p.row_scale != nullptr) return panels_with<W, false, int32_t>(a, p, thread, threads);
  }
  panels_with<W, false, float>(a, p, thread, threads);
}

}  // namespace

int64_t linear_prepared_bytes(const llama_ops_linear_weight& weight, int64_t rows) {
  // Dot products take less.
  return aligned(rows * padded(weight.inputs) * 4) + aligned(rows * 4);
}

void linear_prepare_part(const llama_ops_linear_args& a, int thread, int threads) {
#if defined(__AVX2__)
  if (uses_dots(a.weight, a.rows)) return prepare_dots(a, thread, threads);
#endif
  const Prepared p = prepared_of(a);
  const int64_t depth = padded(a.weight.inputs);
  const Tiles tiles = tiles_of(a.rows);
  prepare_tiles(a, tiles, p.row_scale, thread, threads,
                [&](const float* x, int64_t tile, int r, int64_t begin, int64_t count) {
    const int64_t step = tiles.size(tile);
    if (in_pairs(a)) {
      int32_t* pairs = reinterpret_cast<int32_t*>(p.x) + (tiles.begin(tile) * depth + begin * step) / 2 + r;
      for (int64_t i = 0; i < count; i += 2) pairs[i / 2 * step] = pair_of(x[i], x[i + 1]);
      return;
    }
    float* to = p.x + tiles.begin(tile) * depth + begin * step + r;
    for (int64_t i = 0; i < count; ++i) to[i * step] = x[i];
  });
}

void linear_part(const llama_ops_linear_args& a, int thread, int threads) {
#if defined(__AVX2__)
  if (uses_dots(a.weight, a.rows)) return dot_part(a, thread, threads);
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
