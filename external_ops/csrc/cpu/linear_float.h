// Linears in float32: weights are widened and multiplied with fused multiply-adds. Few rows widen in
// registers while the weights stream by once; more rows widen a block that then serves all of them.
// Rounded rows come here as integers in float32, whose sums over up to kExactInputs are exact.
#pragma once

#include "cpu/gemm.h"
#include "cpu/linear_decode.h"
#include "cpu/parallel.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int64_t kExactInputs = 1024;  // 1024 * 128 * 127 < 2^24
#if defined(__AVX512F__)
constexpr int64_t kStreamInputs = kExactInputs;
constexpr int kStreamVecs = 4;
#else
constexpr int64_t kStreamInputs = 256;  // a panel's part is read more than once: it has to stay near
constexpr int kStreamVecs = 4;
#endif
constexpr int64_t kStreamAhead = 2048;  // bytes of prefetch
constexpr int64_t kBlockInputs = 256;   // widened at a time: a tile's share stays in the L1 cache
constexpr int64_t kBlockRows = 504;     // rows that share a widened block

// Where the sum of a row and panel goes: float32, or int32 where the sum of integers is kept exact.
inline void add_total(float* total, Vec sum) { store(total, load(total) + sum); }
inline void add_total(int32_t* total, Vec sum) {
  IntVec whole;
  memcpy(&whole, total, sizeof whole);
  whole += __builtin_convertvector(sum, IntVec);
  memcpy(total, &whole, sizeof whole);
}

inline Vec load_total(const float* total) { return load(total); }
inline Vec load_total(const int32_t* total) {
  IntVec whole;
  memcpy(&whole, total, sizeof whole);
  return __builtin_convertvector(whole, Vec);
}

// Writes a row's outputs of a panel from their sums [kPanel].
template <class T>
inline void finish_row(const llama_ops_linear_args& a, int64_t panel, int64_t row, float row_scale,
                       const T* total) {
  const int64_t outputs = a.weight.outputs, first = panel * kPanel;
  const bool scaled = a.weight.scale != nullptr && a.weight.groups == 1;
  float* out = a.out + row * outputs + first;
  for (int v = 0; v < kPanelVecs && first + v * kWidth < outputs; ++v) {
    Vec y = load_total(total + v * kWidth);
    if (scaled) y *= load_scale(a.weight, panel, 0, v * kWidth);
    y *= row_scale;
    const int64_t at = v * kWidth, left = outputs - first - at;
    if (left >= kWidth) {
      if (a.bias != nullptr) y += load(a.bias + first + at);
      if (a.residual != nullptr) y += load(a.residual + row * outputs + first + at);
      store(out + at, y);
    } else {
      if (a.bias != nullptr) y += load_some(a.bias + first + at, left);
      if (a.residual != nullptr) y += load_some(a.residual + row * outputs + first + at, left);
      store_some(out + at, y, left);
    }
  }
}

// Adds R rows' products with `count` inputs of a panel, which start at `from`, to acc.
template <class W, int R>
inline __attribute__((always_inline)) void stream_run(const uint8_t* from, const float* x,
                                                      int64_t stride, int64_t count,
                                                      Vec (&acc)[R][kStreamVecs]) {
  for (int64_t k = 0; k < count; k += W::kInputs, from += 4 * kPanel) {
#pragma GCC unroll 4
    for (int v = 0; v < kStreamVecs; ++v) {
      Vec w[W::kInputs];
      W::decode(load_bits(from + v * 4 * kWidth), w);
      __builtin_prefetch(from + v * 4 * kWidth + kStreamAhead);
#pragma GCC unroll 8
      for (int j = 0; j < W::kInputs; ++j) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][v] += splat(x[r * stride + k + j]) * w[j];
      }
    }
  }
}

// The sums of R rows x [R, depth] with a panel, into total [R, kPanel].
template <class W, int R, class T>
void stream_panel(const llama_ops_linear_weight& w, const uint8_t* data, int64_t panel,
                  const float* x, T* total) {
  const int64_t depth = padded(w.inputs);
  const int64_t run = w.groups > 1 ? w.inputs / w.groups : kStreamInputs;
  for (int i = 0; i < R * kPanel; ++i) total[i] = 0;
  for (int64_t begin = 0, group = 0; begin < depth; begin += run, ++group) {
    const int64_t count = smaller(run, depth - begin);
    const uint8_t* from = data + begin / W::kInputs * 4 * kPanel;
    for (int v0 = 0; v0 < kPanelVecs; v0 += kStreamVecs) {
      Vec acc[R][kStreamVecs] = {};
      stream_run<W, R>(from + v0 * 4 * kWidth, x + begin, depth, count, acc);
      for (int v = 0; v < kStreamVecs; ++v) {
        const int at = (v0 + v) * kWidth;
        const Vec scale = w.groups > 1 ? load_scale(w, panel, group, at) : splat(1.0f);
        for (int r = 0; r < R; ++r) add_total(total + r * kPanel + at, acc[r][v] * scale);
      }
    }
  }
}

constexpr int kStreamRows = 4;  // more rows share a widened block

template <class W, class T>
void stream_panels(const llama_ops_linear_args& a, const float* x, const float* row_scale,
                   int thread, int threads) {
  const int64_t bytes = llama_ops_linear_panel_bytes(a.weight.kind, a.weight.inputs);
  const Range outputs = share(a.weight.outputs, kPanel, thread, threads);
  T total[kStreamRows * kPanel];
  for (int64_t panel = outputs.begin / kPanel; panel * kPanel < outputs.end; ++panel) {
    const uint8_t* data = static_cast<const uint8_t*>(a.weight.data) + panel * bytes;
    switch (a.rows) {
      case 1: stream_panel<W, 1>(a.weight, data, panel, x, total); break;
      case 2: stream_panel<W, 2>(a.weight, data, panel, x, total); break;
      case 3: stream_panel<W, 3>(a.weight, data, panel, x, total); break;
      default: stream_panel<W, 4>(a.weight, data, panel, x, total);
    }
    for (int64_t row = 0; row < a.rows; ++row) {
      const float scale = row_scale == nullptr ? 1.0f : row_scale[row];
      finish_row(a, panel, row, scale, total + row * kPanel);
    }
  }
}

// Widens inputs [begin, end) of a panel to [kPanel / kTileOutputs, end - begin, kTileOutputs].
template <class W>
void widen_block(const llama_ops_linear_weight& w, const uint8_t* data, int64_t panel, int64_t begin,
                 int64_t end, float* to) {
  const int64_t depth = end - begin;
  const int64_t size = w.groups > 1 ? w.inputs / w.groups : depth;
  for (int v = 0; v < kPanelVecs; ++v) {
    float* half = to + v / 2 * depth * kTileOutputs + v % 2 * kWidth;
    for (int64_t k = begin; k < end;) {
      const int64_t group = k / size, stop = w.groups > 1 ? smaller(end, (group + 1) * size) : end;
      const Vec scale = w.groups > 1 ? load_scale(w, panel, group, v * kWidth) : splat(1.0f);
      for (; k < stop; k += W::kInputs) {
        Vec wide[W::kInputs];
        W::decode(load_bits(data + k / W::kInputs * 4 * kPanel + v * 4 * kWidth), wide);
        float* line = half + (k - begin) * kTileOutputs;
        for (int j = 0; j < W::kInputs; ++j) store(line + j * kTileOutputs, wide[j] * scale);
      }
    }
  }
}

template <int R, class T>
void tile_into(const float* x, const float* block, int64_t depth, T* total) {
  for (int n = 0; n < kPanel / kTileOutputs; ++n) {
    Vec sum[R][2];
    multiply_tile<R>(x, block + n * depth * kTileOutputs, depth, sum);
    for (int r = 0; r < R; ++r) {
      T* to = total + r * kPanel + n * kTileOutputs;
      add_total(to, sum[r][0]);
      add_total(to + kWidth, sum[r][1]);
    }
  }
}

// Rows [first, last) of tiles with a panel. x holds tiles one after another, each [depth, its rows].
template <class W, class T>
void block_panel(const llama_ops_linear_args& a, const float* x, const float* row_scale,
                 int64_t panel, Tiles tiles, int64_t first, int64_t last, float* block) {
  const int64_t depth = padded(a.weight.inputs), begin_row = tiles.begin(first);
  const int64_t rows = tiles.begin(last) - begin_row;
  const int64_t bytes = llama_ops_linear_panel_bytes(a.weight.kind, a.weight.inputs);
  const uint8_t* data = static_cast<const uint8_t*>(a.weight.data) + panel * bytes;
  T* total = reinterpret_cast<T*>(block + kBlockInputs * kPanel);
  memset(total, 0, rows * kPanel * sizeof(T));
  for (int64_t k = 0; k < depth; k += kBlockInputs) {
    const int64_t end = smaller(k + kBlockInputs, depth);
    widen_block<W>(a.weight, data, panel, k, end, block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int size = tiles.size(tile);
      const float* from = x + tiles.begin(tile) * depth + k * size;
      T* to = total + (tiles.begin(tile) - begin_row) * kPanel;
      LLAMA_OPS_FOR_TILE(size, tile_into, from, block, end - k, to)
    }
  }
  for (int64_t row = begin_row; row < begin_row + rows; ++row) {
    const float scale = row_scale == nullptr ? 1.0f : row_scale[row];
    finish_row(a, panel, row, scale, total + (row - begin_row) * kPanel);
  }
}

template <class W, class T>
void block_panels(const llama_ops_linear_args& a, const float* x, const float* row_scale,
                  int thread, int threads, int slot) {
  const Tiles tiles = tiles_of(a.rows);
  const int64_t per_item = kBlockRows / kTileRows;
  const int64_t parts = (tiles.count + per_item - 1) / per_item;
  const int64_t panels = (a.weight.outputs + kPanel - 1) / kPanel;
  const int64_t rows = smaller(a.rows, kBlockRows + kTileRows);
  float* block = static_cast<float*>(scratch(slot, (kBlockInputs + rows) * kPanel * 4));
  const Range items = share(panels * parts, 1, thread, threads);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t part = item % parts, first = tiles.count * part / parts;
    const int64_t last = tiles.count * (part + 1) / parts;
    block_panel<W, T>(a, x, row_scale, item / parts, tiles, first, last, block);
  }
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
