// Linears in float32: weights are widened and multiplied with fused multiply-adds. Few rows widen in
// registers while the weights stream by once; more rows widen a block that then serves all of them.
// Both add up a row's products in one order (Parts), so that its bits do not depend on how many rows
// there are. Rounded rows that cpu/linear_dot.h leaves come here as integers in float32; sums of up to
// kExactInputs are exact. Many of them come as pairs of 16 bits where an instruction multiplies those: the
// same sums, and twice as many products at a time.
#pragma once

#include "cpu/gemm.h"
#include "cpu/linear_decode.h"
#include "cpu/parallel.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

// Rows that are multiplied while weights stream by; more share a widened block.
#if defined(__AVX512F__)
constexpr int kStreamRows = 8;
#else
constexpr int kStreamRows = 4;
#endif
constexpr int kStreamSteps = 32;         // steps of a panel at a time: 8 KiB, a quarter of the L1 cache
constexpr int64_t kStreamAhead = 4096;   // bytes of prefetch where a panel is read in one go
constexpr int64_t kPrepareInputs = 256;  // of x, brought into order at a time: a tile of them in L1
constexpr int64_t kExactInputs = 1024;   // 1024 * 128 * 127 < 2^24
constexpr int64_t kBlockInputs = 256;    // in one sum, and widened at a time: a tile's share fits L1
constexpr int64_t kBlockRows = 504;      // rows that share a widened block
static_assert(kBlockInputs <= kExactInputs, "sums are exact");
static_assert(kBlockInputs % (kStreamSteps * 8) == 0, "a part is whole runs");

// Vectors of a panel whose sums R rows keep in registers.
constexpr int stream_vecs(int rows) { return rows <= kStreamRows / 2 ? 4 : 2; }

// How the sum of a row and output is cut, for few rows and for many alike: one input after the other is
// added to a part, and one part after the other to the total, times its group's scale where kScaled.
template <bool kScaled>
struct Parts {
  const llama_ops_linear_weight& w;
  const int64_t panel;
  const int64_t depth = padded(w.inputs), size = kScaled ? w.inputs / w.groups : depth;

  // Where the part ends that begins at an input of a group: with the block, or before it.
  int64_t end(int64_t begin, int64_t group) const {
    const int64_t block_end = smaller((begin / kBlockInputs + 1) * kBlockInputs, depth);
    return kScaled ? smaller(block_end, (group + 1) * size) : block_end;
  }

  // The group's scales of V vectors of outputs, from one on.
  template <int V>
  inline __attribute__((always_inline)) void scales(int64_t group, int first, Vec (&to)[V]) const {
    if constexpr (kScaled) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) to[v] = load_scale(w, panel, group, first + v * kWidth);
    }
  }

  // What of a sum goes into the total.
  static inline __attribute__((always_inline)) Vec scaled(Vec sum, const Vec& scale) {
    if constexpr (kScaled) return sum * scale;
    return sum;
  }
};

// One row of floats keeps eight where these are all of a panel; integers took the registers for that.
template <class W>
constexpr int stream_vecs_of(int rows) {
  return rows == 1 && kPanelVecs == 8 && W::kInputs <= 2 ? kPanelVecs : stream_vecs(rows);
}

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

// Asks for what finish_row will write while sums are being computed: else each row would wait for its
// lines, and the stores of sums behind it.
inline void fetch_outputs(const llama_ops_linear_args& a, int64_t panel, int64_t row, int rows) {
  const int64_t outputs = a.weight.outputs, first = panel * kPanel;
  for (int r = 0; r < rows; ++r) {
    const float* out = a.out + (row + r) * outputs + first;
    for (int64_t i = 0; i < smaller<int64_t>(kPanel, outputs - first); i += 16) {
      __builtin_prefetch(out + i, 1);
    }
  }
}

// Writes a row's outputs of a panel from their sums [kPanel]. Not inlined, so that the compiler fuses
// the same multiplications and additions for all callers.
template <class T>
__attribute__((noinline)) void finish_row(const llama_ops_linear_args& a, int64_t panel,
                                          int64_t row, float row_scale, const T* total) {
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

// Adds R rows' products with input J of a step to acc.
template <class W, int J, int R, int V>
inline __attribute__((always_inline)) void stream_input(const BitVec (&bits)[V], const float* x,
                                                        Vec (&acc)[R * V]) {
  Vec w[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) w[v] = W::template input<J>(bits[v]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec one = splat(x[J * R + r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r * V + v] += one * w[v];
  }
  if constexpr (J + 1 < W::kInputs) stream_input<W, J + 1, R, V>(bits, x, acc);
}

// The same for one row, a vector of the panel after the other.
template <class W, int J>
inline __attribute__((always_inline)) Vec stream_one(BitVec bits, const float* x, Vec acc) {
  acc += splat(x[J]) * W::template input<J>(bits);
  if constexpr (J + 1 < W::kInputs) return stream_one<W, J + 1>(bits, x, acc);
  return acc;
}

// Fetches what a step of V vectors stands for, in the order in which it lies.
template <int V>
inline __attribute__((always_inline)) const uint8_t* prefetch_step(const uint8_t* next) {
#pragma GCC unroll 8
  for (int i = 0; i < V * 4 * kWidth; i += 64) __builtin_prefetch(next + i);
  return next + V * 4 * kWidth;
}

// Where the pass from vector v0 on over a run of `steps` steps at `from` begins to fetch: the passes
// share a run further on.
template <int V>
inline const uint8_t* prefetch_start(const uint8_t* from, int64_t steps, int v0) {
  if (V == kPanelVecs) return from + kStreamAhead;
  return from + kStreamSteps * 4 * kPanel + steps * v0 * 4 * kWidth;
}

// Adds R rows' products with `count` inputs of a panel, which start at `from`, to acc. x is a tile.
// Meanwhile fetches from `next` on.
template <class W, int R, int V>
inline __attribute__((always_inline)) void stream_run(const uint8_t* from, const float* x,
                                                      const uint8_t* next, int64_t count,
                                                      Vec (&acc)[R * V]) {
  for (int64_t k = 0; k < count; k += W::kInputs, from += 4 * kPanel) {
    if constexpr (R == 1 && V == 8) {
      next = prefetch_step<V>(next);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[v] = stream_one<W, 0>(load_bits(from + v * 4 * kWidth), x + k, acc[v]);
      }
      continue;
    }
    BitVec bits[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      bits[v] = load_bits(from + v * 4 * kWidth);
    }
    next = prefetch_step<V>(next);
    stream_input<W, 0, R, V>(bits, x + k * R, acc);
  }
}

// Adds a part of R rows' sums of V vectors of a panel, from vector v0 on, to total [R, kPanel]. This and
// the next are functions of their own: inlined, the innermost loop got too few registers.
template <class W, int R, int V, bool kScaled, class T>
__attribute__((noinline)) void add_part(const Parts<kScaled>& parts, int64_t group, int v0,
                                        const uint8_t* from, const float* x, const uint8_t* next,
                                        int64_t count, T* total) {
  Vec acc[R * V], scale[V];  // one index, or they would go through memory
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) acc[i] = Vec{};
  stream_run<W, R, V>(from, x, next, count, acc);
  parts.scales(group, v0 * kWidth, scale);
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) {
    add_total(total + i / V * kPanel + (v0 + i % V) * kWidth, parts.scaled(acc[i], scale[i % V]));
  }
}

// Goes on with R rows' sums of V vectors of a panel, kept as [R, kPanel].
template <class W, int R, int V>
__attribute__((noinline)) void go_on(const uint8_t* from, const float* x, const uint8_t* next,
                                     int64_t count, float* kept) {
  Vec acc[R * V];
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) acc[i] = load(kept + i / V * kPanel + i % V * kWidth);
  stream_run<W, R, V>(from, x, next, count, acc);
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) store(kept + i / V * kPanel + i % V * kWidth, acc[i]);
}

// Adds sums of R rows and a panel, kept as [R, kPanel], to total, and begins new ones.
template <int R, bool kScaled, class T>
inline void add_kept(const Parts<kScaled>& parts, int64_t group, float* kept, T* total) {
  Vec scale[kPanelVecs];
  parts.scales(group, 0, scale);
  for (int r = 0; r < R; ++r, kept += kPanel, total += kPanel) {
    for (int v = 0; v < kPanelVecs; ++v) {
      add_total(total + v * kWidth, parts.scaled(load(kept + v * kWidth), scale[v]));
      store(kept + v * kWidth, Vec{});
    }
  }
}

// Adds the part [begin, end) of R rows' sums with a panel to total [R, kPanel]; all of the panel's
// vectors at once, or passes over some that share a run of it.
template <class W, int R, bool kScaled, class T>
inline __attribute__((always_inline)) void stream_part(const Parts<kScaled>& parts,
                                                       const uint8_t* data, int64_t group,
                                                       int64_t begin, int64_t end, const float* x,
                                                       float* kept, T* total) {
  constexpr int vecs = stream_vecs_of<W>(R);
  constexpr int64_t run = vecs == kPanelVecs ? kBlockInputs : kStreamSteps * W::kInputs;
  const bool once = run == kBlockInputs || end - begin <= run;
  for (int64_t first = begin; first < end; first += run) {
    const int64_t count = smaller(run, end - first);
    const uint8_t* from = data + first / W::kInputs * 4 * kPanel;
    for (int v0 = 0; v0 < kPanelVecs; v0 += vecs) {
      const uint8_t* next = prefetch_start<vecs>(from, count / W::kInputs, v0);
      const uint8_t* own = from + v0 * 4 * kWidth;
      if (once) {
        add_part<W, R, vecs>(parts, group, v0, own, x + first * R, next, count, total);
      } else {
        go_on<W, R, vecs>(own, x + first * R, next, count, kept + v0 * kWidth);
      }
    }
  }
  if (!once) add_kept<R>(parts, group, kept, total);
}

// The sums of a tile of R rows with a panel, into total [R, kPanel].
template <class W, int R, bool kScaled, class T>
void stream_panel(const llama_ops_linear_weight& w, const uint8_t* data, int64_t panel,
                  const float* x, T* total) {
  const Parts<kScaled> parts{w, panel};
  float kept[R * kPanel];
  for (int i = 0; i < R * kPanel; ++i) kept[i] = 0, total[i] = 0;
  for (int64_t begin = 0, group = 0, end; begin < parts.depth; begin = end) {
    if (begin == (group + 1) * parts.size) ++group;
    end = parts.end(begin, group);
    stream_part<W, R>(parts, data, group, begin, end, x, kept, total);
  }
}

template <class W, bool kScaled, class T>
void stream_rows(const llama_ops_linear_args& a, const uint8_t* data, int64_t panel, const float* x,
                 T* total) {
  switch (a.rows) {
    case 1: return stream_panel<W, 1, kScaled>(a.weight, data, panel, x, total);
    case 2: return stream_panel<W, 2, kScaled>(a.weight, data, panel, x, total);
    case 3: return stream_panel<W, 3, kScaled>(a.weight, data, panel, x, total);
    case 4: return stream_panel<W, 4, kScaled>(a.weight, data, panel, x, total);
#if defined(__AVX512F__)
    case 5: return stream_panel<W, 5, kScaled>(a.weight, data, panel, x, total);
    case 6: return stream_panel<W, 6, kScaled>(a.weight, data, panel, x, total);
    case 7: return stream_panel<W, 7, kScaled>(a.weight, data, panel, x, total);
    case 8: return stream_panel<W, 8, kScaled>(a.weight, data, panel, x, total);
#endif
  }
}

template <class W, bool kScaled, class T>
void stream_panels(const llama_ops_linear_args& a, const float* x, const float* row_scale,
                   int thread, int threads) {
  const int64_t bytes = llama_ops_linear_panel_bytes(a.weight.kind, a.weight.inputs);
  const Range outputs = share(a.weight.outputs, kPanel, thread, threads);
  T total[kStreamRows * kPanel];
  for (int64_t panel = outputs.begin / kPanel; panel * kPanel < outputs.end; ++panel) {
    const uint8_t* data = static_cast<const uint8_t*>(a.weight.data) + panel * bytes;
    stream_rows<W, kScaled>(a, data, panel, x, total);
    for (int64_t row = 0; row < a.rows; ++row) {
      const float scale = row_scale == nullptr ? 1.0f : row_scale[row];
      finish_row(a, panel, row, scale, total + row * kPanel);
    }
  }
}

// What a word of four bytes of a tile of x, or of a widened block, holds: a number, or integers in pairs.
template <class X>
constexpr int kInputsOf = 1;
template <>
constexpr int kInputsOf<int32_t> = 2;

// Whether x comes in pairs.
inline bool in_pairs(const llama_ops_linear_args& a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return rounds_rows(a.weight.kind) && a.rows > kStreamRows;
#else
  return false;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// As cpu/gemm.h does, of pairs.
template <int R>
inline __attribute__((always_inline)) void multiply_tile(const int32_t* a, const int32_t* b,
                                                         int64_t words, Vec (&total)[R][2]) {
  __m256i sums[R][2];
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < words; ++k) {
    const __m256i* line = reinterpret_cast<const __m256i*>(b + k * kTileOutputs);
    const __m256i b0 = _mm256_loadu_si256(line), b1 = _mm256_loadu_si256(line + 1);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i x = _mm256_set1_epi32(a[k * R + r]);
      // By hand: the compiler multiplies for all rows first and runs out of registers, or copies.
      __asm__("vpaddd %1, %0, %0" : "+x"(sums[r][0]) : "x"(_mm256_madd_epi16(x, b0)));
      __asm__("vpaddd %1, %0, %0" : "+x"(sums[r][1]) : "x"(_mm256_madd_epi16(x, b1)));
    }
  }
  for (int r = 0; r < R; ++r) {
    total[r][0] = __builtin_convertvector((IntVec)sums[r][0], Vec);
    total[r][1] = __builtin_convertvector((IntVec)sums[r][1], Vec);
  }
}
#endif

// Widens inputs J ... of a step; see widen_block.
template <class W, int J>
inline __attribute__((always_inline)) void widen_inputs(BitVec bits, float* to) {
  store(to + J * kTileOutputs, W::template input<J>(bits));
  if constexpr (J + 1 < W::kInputs) widen_inputs<W, J + 1>(bits, to);
}
template <class W, int J>
inline __attribute__((always_inline)) void widen_inputs(BitVec bits, int32_t* to) {
  const BitVec pair = W::template pair<J>(bits);
  memcpy(to + J * kTileOutputs, &pair, sizeof pair);
  if constexpr (2 * J + 2 < W::kInputs) widen_inputs<W, J + 1>(bits, to);
}

// Widens inputs [begin, end) of a panel to words [kPanel / kTileOutputs, words, kTileOutputs].
template <class W, class X>
void widen_block(const uint8_t* data, int64_t begin, int64_t end, X* to) {
  const int64_t depth = (end - begin) / kInputsOf<X>;
  for (int64_t k = begin; k < end; k += W::kInputs) {
    const uint8_t* from = data + k / W::kInputs * 4 * kPanel;
    X* line = to + (k - begin) / kInputsOf<X> * kTileOutputs;
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) {
      __builtin_prefetch(from + v * 4 * kWidth + kStreamAhead);
      widen_inputs<W, 0>(load_bits(from + v * 4 * kWidth),
                         line + v / 2 * depth * kTileOutputs + v % 2 * kWidth);
    }
  }
}

// Adds the parts of R rows' sums that lie in a widened block, inputs [begin, end), to total [R, kPanel].
template <int R, bool kScaled, class X, class T>
void tile_into(const Parts<kScaled>& parts, const X* x, const X* block, int64_t begin, int64_t end,
               T* total) {
  constexpr int each = kInputsOf<X>;
  for (int n = 0; n < kPanel / kTileOutputs; ++n, block += (end - begin) / each * kTileOutputs) {
    int64_t group = begin / parts.size;
    for (int64_t k = begin, stop; k < end; k = stop, ++group) {
      stop = parts.end(k, group);
      Vec sum[R][2], scale[2];
      const int64_t at = (k - begin) / each, words = (stop - k) / each;
      multiply_tile<R>(x + at * R, block + at * kTileOutputs, words, sum);
      parts.scales(group, n * kTileOutputs, scale);
      for (int r = 0; r < R; ++r) {
        T* to = total + r * kPanel + n * kTileOutputs;
        add_total(to, parts.scaled(sum[r][0], scale[0]));
        add_total(to + kWidth, parts.scaled(sum[r][1], scale[1]));
      }
    }
  }
}

// Rows [first, last) of tiles with a panel. x holds tiles one after another, each [depth, its rows].
template <class W, bool kScaled, class T, class X>
void block_panel(const llama_ops_linear_args& a, const X* x, const float* row_scale, int64_t panel,
                 Tiles tiles, int64_t first, int64_t last, X* block) {
  const int64_t depth = padded(a.weight.inputs), begin_row = tiles.begin(first);
  const int64_t rows = tiles.begin(last) - begin_row;
  const int64_t bytes = llama_ops_linear_panel_bytes(a.weight.kind, a.weight.inputs);
  const uint8_t* data = static_cast<const uint8_t*>(a.weight.data) + panel * bytes;
  T* total = reinterpret_cast<T*>(block + kBlockInputs * kPanel);
  const Parts<kScaled> parts{a.weight, panel};
  memset(total, 0, rows * kPanel * sizeof(T));
  for (int64_t k = 0; k < depth; k += kBlockInputs) {
    const int64_t end = smaller(k + kBlockInputs, depth);
    widen_block<W>(data, k, end, block);
    for (int64_t tile = first; tile < last; ++tile) {
      const int size = tiles.size(tile);
      const X* from = x + (tiles.begin(tile) * depth + k * size) / kInputsOf<X>;
      T* to = total + (tiles.begin(tile) - begin_row) * kPanel;
      LLAMA_OPS_FOR_TILE(size, tile_into, parts, from, block, k, end, to)
    }
  }
  for (int64_t row = begin_row; row < begin_row + rows; ++row) {
    const float scale = row_scale == nullptr ? 1.0f : row_scale[row];
    finish_row(a, panel, row, scale, total + (row - begin_row) * kPanel);
  }
}

template <class W, bool kScaled, class T, class X>
void block_panels(const llama_ops_linear_args& a, const X* x, const float* row_scale, int thread,
                  int threads, int slot) {
  const Tiles tiles = tiles_of(a.rows);
  const int64_t per_item = kBlockRows / kTileRows;
  const int64_t parts = (tiles.count + per_item - 1) / per_item;
  const int64_t panels = (a.weight.outputs + kPanel - 1) / kPanel;
  const int64_t rows = smaller(a.rows, kBlockRows + kTileRows);
  X* block = static_cast<X*>(scratch(slot, (kBlockInputs + rows) * kPanel * 4));
  const Range items = share(panels * parts, 1, thread, threads);
  for (int64_t item = items.begin; item < items.end; ++item) {
    const int64_t part = item % parts, first = tiles.count * part / parts;
    const int64_t last = tiles.count * (part + 1) / parts;
    block_panel<W, kScaled, T>(a, x, row_scale, item / parts, tiles, first, last, block);
  }
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
