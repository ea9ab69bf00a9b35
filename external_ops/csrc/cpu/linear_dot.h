// Linears by instructions that multiply pairs or quadruples of narrow numbers: 8-bit integers with
// AVX512_VNNI, bfloat16 with AVX512_BF16; integers also with what any AVX-512 or AVX2 has. The `emulated`
// level is the code for AVX512_VNNI and AVX512_BF16 with these instructions written out.
#pragma once

#include "cpu/linear_float.h"
#include "cpu/narrow.h"

#if defined(__AVX2__)

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

#if defined(LLAMA_OPS_EMULATE) || defined(__AVX512VNNI__)
constexpr bool kHasDots = true;
#else
constexpr bool kHasDots = false;
#endif

// Rows of the largest tile. A tile holds x as words of four bytes, [words, its rows].
#if defined(__AVX512F__)
constexpr int kDotRows = 8;
#else
constexpr int kDotRows = 4;
#endif
// Steps of a panel in one pass where there is one only, or where several tiles read the panel from the
// second-level cache; and in one sum of floats, however many rows there are.
constexpr int kBlockSteps = 128;
// Of panels that every tile meets before the next ones: they stay in the second-level cache, and x,
// which may be too large for it, is read less often. Meanwhile the next ones are fetched into it.
constexpr int64_t kTogetherBytes = 512 << 10;

#if defined(LLAMA_OPS_EMULATE)
inline __m512i dot_bytes(__m512i sum, __m512i unsigned_w, __m512i signed_x) {
  const __m512i even_w = _mm512_and_si512(unsigned_w, _mm512_set1_epi16(255));
  const __m512i odd_w = _mm512_srli_epi16(unsigned_w, 8);
  const __m512i even_x = _mm512_srai_epi16(_mm512_slli_epi16(signed_x, 8), 8);
  const __m512i odd_x = _mm512_srai_epi16(signed_x, 8);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even_w, even_x));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(odd_w, odd_x));
}
inline __m512 dot_halves(__m512 sum, __m512i w, __m512i x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 odd_w = _mm512_castsi512_ps(_mm512_and_si512(w, upper));
  const __m512 odd_x = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
  const __m512 even_w = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  const __m512 even_x = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  return _mm512_fmadd_ps(even_w, even_x, _mm512_fmadd_ps(odd_w, odd_x, sum));
}
#elif defined(__AVX512VNNI__)
// GCC 12 would copy every sum before and after an instruction that adds to it; an empty `asm` keeps
// it from that.
inline __m512i dot_bytes(__m512i sum, __m512i unsigned_w, __m512i signed_x) {
  sum = _mm512_dpbusd_epi32(sum, unsigned_w, signed_x);
  __asm__("" : "+v"(sum));
  return sum;
}
inline __m512 dot_halves(__m512 sum, __m512i w, __m512i x) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  __asm__("" : "+v"(sum));
  return sum;
}
#endif

// Each kind: kWords words of x in a step of 256 bytes of weights; kChunk steps between flushes;
// kZero, what integers are offset by; word<J>, the weights that meet word J.
struct Int4Dot {
  using Acc = Narrow;
  static constexpr int kWords = 2, kChunk = 4, kZero = 8;
  template <int J>
  static inline Narrow word(Narrow bits) {
    return both(J == 0 ? bits : shorts_right<4>(bits), all_shorts(0x0f0f));
  }
#if defined(LLAMA_OPS_EMULATE) || defined(__AVX512VNNI__)
  static constexpr bool kPairs = false;
  static inline Acc add(Acc acc, Narrow w, Narrow x) { return dot_bytes(acc, w, x); }
  static inline Narrow sum(Acc acc) { return acc; }
#else
  // Sums in 16 bits, of inputs 0 and 1 of each word and of 2 and 3. The 16 products of a chunk less
  // what the offset adds are at most 16 * 8 * 127, and so it does not matter that sums may wrap
  // around on the way; a pair's, below 2 * 15 * 127, does not saturate.
  static constexpr bool kPairs = true;
  static inline Acc add(Acc acc, Narrow w, Narrow x) {
    return in_register(add_shorts(acc, pairs_of_bytes(w, x)));
  }
  static inline Narrow sum(Acc acc) { return pairs_of_shorts(acc, all_shorts(1)); }
#endif
};

struct Int8Dot {
  using Acc = Narrow;
  static constexpr int kWords = kHasDots ? 1 : 2, kChunk = kStreamSteps, kZero = 128;
  static constexpr bool kPairs = false;
  static inline Narrow sum(Acc acc) { return acc; }
#if defined(LLAMA_OPS_EMULATE) || defined(__AVX512VNNI__)
  template <int J>
  static inline Narrow word(Narrow bits) { return bits; }
  static inline Acc add(Acc acc, Narrow w, Narrow x) { return dot_bytes(acc, w, x); }
#else
  // In 16 bits, inputs 0 and 2 of the step, then 1 and 3; the words of x are the same.
  template <int J>
  static inline Narrow word(Narrow bits) {
    return J == 0 ? both(bits, all_shorts(255)) : shorts_right<8>(bits);
  }
  static inline Acc add(Acc acc, Narrow w, Narrow x) {
    return in_register(add_words(acc, pairs_of_shorts(w, x)));
  }
#endif
};

#if defined(LLAMA_OPS_EMULATE) || defined(__AVX512VNNI__)
struct Bf16Dot {
  using Acc = __m512;
  static constexpr int kWords = 1, kChunk = kStreamSteps, kZero = 0;
  static constexpr bool kPairs = false;
  template <int J>
  static inline Narrow word(Narrow bits) { return bits; }
  static inline Acc add(Acc acc, Narrow w, Narrow x) { return dot_halves(acc, w, x); }
  static inline Acc sum(Acc acc) { return acc; }
};
#endif

// Where a chunk's sums go, for one row: float32 times the group's scale, or exact int32.
#if defined(__AVX512F__)
inline void flush(__m512 sum, const Vec&, float* total) {
  _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), sum));
}
#endif
inline void flush(Narrow sum, const Vec& scale, float* total) {
  store(total, load(total) + floats_of(sum) * scale);
}
inline void flush(Narrow sum, const Vec&, int32_t* total) {
  store_narrow(total, add_words(load_narrow(total), sum));
}

// A tile of rows as dot products read it.
struct DotTile {
  const int32_t* words;  // [words, rows]
  const int32_t* zeros;  // [chunks, rows]: what a chunk's sums start at, for the weights' offset
  int rows;
};

// What several tiles fetch while they multiply from the second-level cache: an equal share each, from
// `from` on, spread over all of the tile's steps. One tile fetches what it will read itself.
struct Ahead {
  const uint8_t* from;
  int64_t tiles;

  // Bytes for each step of V vectors.
  template <int V>
  int64_t stride() const { return (V * 4 * kWidth + tiles - 1) / tiles; }

  // Where a pass begins to fetch, from vector v0 on over steps [run, stop) of the panel at `data`.
  template <int V>
  const uint8_t* start(const uint8_t* data, int64_t run, int64_t stop, int v0) const {
    if (tiles == 1) return prefetch_start<V>(data + run * 4 * kPanel, stop - run, v0);
    return from + (run * (kPanelVecs / V) + (stop - run) * (v0 / V)) * stride<V>();
  }
};

// Vectors of a panel whose sums R rows keep in registers. One row keeps all, and reads the panel in one go.
constexpr int dot_vecs(int rows) { return rows == 1 ? kPanelVecs : stream_vecs(rows); }

// Sums of R rows and V vectors of outputs. One index, and loops that are unrolled: else they would go
// through memory in the innermost loop.
template <class D, int R, int V>
struct DotSums {
  typename D::Acc of[R * V];

  // `chunks` of them begin at `zeros`.
  inline __attribute__((always_inline)) void start(const int32_t* zeros, int64_t chunks) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typename D::Acc zero = {};
      if constexpr (D::kZero != 0) {
        int32_t first = zeros[r];
        for (int64_t i = 1; i < chunks; ++i) first += zeros[i * R + r];
        zero = (typename D::Acc)all_words(first);
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of[r * V + v] = zero;
    }
  }

  template <int J>
  inline __attribute__((always_inline)) void add_word(const Narrow (&bits)[V], const int32_t* x) {
    Narrow w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = D::template word<J>(bits[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Narrow one = all_words(x[J * R + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of[r * V + v] = D::add(of[r * V + v], w[v], one);
    }
  }

  // Of one row and vector v.
  inline __attribute__((always_inline)) void add_vector(int v, Narrow bits, const int32_t* x) {
    of[v] = D::add(of[v], D::template word<0>(bits), all_words(x[0]));
    if constexpr (D::kWords == 2) {
      of[v] = D::add(of[v], D::template word<1>(bits), all_words(x[1]));
    }
  }

  // Adds the products of `steps` steps at `from` with the words at x; meanwhile fetches from `next` on,
  // `stride` bytes further each step.
  inline __attribute__((always_inline)) void add(const uint8_t* from, const int32_t* x,
                                                 const uint8_t* next, int64_t stride, int64_t steps) {
    for (; steps > 0; --steps, from += 4 * kPanel, x += D::kWords * R) {
      if constexpr (V == 8) {  // no registers for the weights of all
        prefetch_step<V>(next);
        next += stride;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) add_vector(v, load_narrow(from + v * 4 * kWidth), x);
        continue;
      }
      Narrow bits[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) bits[v] = load_narrow(from + v * 4 * kWidth);
      prefetch_step<V>(next);
      next += stride;
      add_word<0>(bits, x);
      if constexpr (D::kWords == 2) add_word<1>(bits, x);
    }
  }

  // Goes on with sums [R, kPanel] of floats, and leaves them there.
  inline __attribute__((always_inline)) void resume(const float* kept) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of[r * V + v] = (typename D::Acc)load(kept + r * kPanel + v * kWidth);
    }
  }
  inline __attribute__((always_inline)) void keep(float* kept) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(kept + r * kPanel + v * kWidth, (Vec)of[r * V + v]);
    }
  }

  // Adds them to `total` [R, kPanel], multiplied by scales [V vectors] where these are floats.
  template <class T>
  inline __attribute__((always_inline)) void flush_to(T* total, const Vec (&scale)[V]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        flush(D::sum(of[r * V + v]), scale[v], total + r * kPanel + v * kWidth);
      }
    }
  }
};

// The sums of a tile of R rows with a panel, into total [R, kPanel], kSteps steps at a time. Sums of
// floats go on from one time to the next until they have kBlockSteps: their order is that of whole blocks.
template <class D, int R, int kSteps, class T>
void dot_panel(const llama_ops_linear_weight& w, const uint8_t* data, int64_t panel,
               const DotTile& tile, const Ahead& ahead, T* total) {
  constexpr int vecs = dot_vecs(R);
  const int64_t steps = llama_ops_linear_panel_bytes(w.kind, w.inputs) / (4 * kPanel);
  const int64_t group = w.groups > 1 ? steps / w.groups : steps;
  constexpr int at_once = D::kChunk == kStreamSteps ? kSteps : D::kChunk;  // steps between flushes
  static_assert(kStreamSteps % D::kChunk == 0, "a chunk's number does not depend on the run");
  constexpr bool goes_on = D::kZero == 0 && kSteps < kBlockSteps;
  const int64_t stride = ahead.stride<vecs>();
  float kept[goes_on ? R * kPanel : 1];
  memset(total, 0, R * kPanel * sizeof(T));
  for (int64_t run = 0; run < steps; run += kSteps) {
    const int64_t stop = smaller(run + kSteps, steps);
    const bool opens = run % kBlockSteps == 0, closes = stop % kBlockSteps == 0 || stop == steps;
    for (int v0 = 0; v0 < kPanelVecs; v0 += vecs) {
      const uint8_t* from = data + v0 * 4 * kWidth;
      const uint8_t* next = ahead.start<vecs>(data, run, stop, v0);
      int64_t number = run / group, end = (number + 1) * group;
      for (int64_t step = run; step < stop; step += at_once) {
        if (step >= end) ++number, end += group;
        Vec scale[vecs] = {};
        if (w.groups > 1) {
#pragma GCC unroll 8
          for (int v = 0; v < vecs; ++v) scale[v] = load_scale(w, panel, number, (v0 + v) * kWidth);
        }
        const int64_t count = smaller<int64_t>(at_once, stop - step);
        DotSums<D, R, vecs> sums;
        if constexpr (goes_on) {
          opens ? sums.start(nullptr, 0) : sums.resume(kept + v0 * kWidth);
        } else {
          sums.start(tile.zeros + step / D::kChunk * R, (count + D::kChunk - 1) / D::kChunk);
        }
        sums.add(from + step * 4 * kPanel, tile.words + step * D::kWords * R,
                 next + (step - run) * stride, stride, count);
        if constexpr (goes_on) {
          closes ? sums.flush_to(total + v0 * kWidth, scale) : sums.keep(kept + v0 * kWidth);
        } else {
          sums.flush_to(total + v0 * kWidth, scale);
        }
      }
    }
  }
}

template <class D, int kSteps, class T>
void dot_tile(const llama_ops_linear_weight& w, const uint8_t* data, int64_t panel,
              const DotTile& tile, const Ahead& ahead, T* total) {
  switch (tile.rows) {
    case 1: return dot_panel<D, 1, kSteps>(w, data, panel, tile, ahead, total);
    case 2: return dot_panel<D, 2, kSteps>(w, data, panel, tile, ahead, total);
    case 3: return dot_panel<D, 3, kSteps>(w, data, panel, tile, ahead, total);
#if defined(__AVX512F__)
    case 4: return dot_panel<D, 4, kSteps>(w, data, panel, tile, ahead, total);
    case 5: return dot_panel<D, 5, kSteps>(w, data, panel, tile, ahead, total);
    case 6: return dot_panel<D, 6, kSteps>(w, data, panel, tile, ahead, total);
    case 7: return dot_panel<D, 7, kSteps>(w, data, panel, tile, ahead, total);
#endif
    default: return dot_panel<D, kDotRows, kSteps>(w, data, panel, tile, ahead, total);
  }
}

// Where x lies for dot products: words of all tiles, then scales of rows, then zeros of all tiles.
struct DotPrepared {
  int32_t* words;
  float* row_scale;  // null for bfloat16
  int32_t* zeros;
  int64_t row_words, row_zeros;  // of one row
};

inline DotPrepared dot_prepared(const llama_ops_linear_args& a) {
  const int kind = a.weight.kind;
  const int64_t steps = llama_ops_linear_panel_bytes(kind, a.weight.inputs) / (4 * kPanel);
  const bool four = kind == LLAMA_OPS_LINEAR_INT4;
  const bool two = four || (kind == LLAMA_OPS_LINEAR_INT8 && Int8Dot::kWords == 2);
  const int64_t row_words = steps * (two ? 2 : 1), chunk = four ? Int4Dot::kChunk : Int8Dot::kChunk;
  int32_t* words = static_cast<int32_t*>(a.prepared);
  if (!rounds_rows(kind)) return {words, nullptr, nullptr, row_words, 0};
  float* row_scale = reinterpret_cast<float*>(words + a.rows * row_words);
  int32_t* zeros = reinterpret_cast<int32_t*>(row_scale + a.rows);
  return {words, row_scale, zeros, row_words, (steps + chunk - 1) / chunk};
}

inline Tiles dot_tiles(int64_t rows) { return {rows, (rows + kDotRows - 1) / kDotRows}; }

template <class D, class T>
void dot_panels(const llama_ops_linear_args& a, int thread, int threads) {
  const DotPrepared p = dot_prepared(a);
  const Tiles tiles = dot_tiles(a.rows);
  const int64_t bytes = llama_ops_linear_panel_bytes(a.weight.kind, a.weight.inputs);
  const Range outputs = share(a.weight.outputs, kPanel, thread, threads);
  const int64_t panels = (outputs.end + kPanel - 1) / kPanel;
  const int64_t together = larger<int64_t>(kTogetherBytes / larger<int64_t>(bytes, 1), 1);
  T total[kDotRows * kPanel];
  for (int64_t begin = outputs.begin / kPanel; begin < panels; begin += together) {
    const int64_t end = smaller(begin + together, panels);
    const uint8_t* weights = static_cast<const uint8_t*>(a.weight.data);
    // Behind the last ones there is nothing to fetch.
    const uint8_t* next = weights + (end < panels ? end : begin) * bytes;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t first = tiles.begin(i);
      const DotTile tile{p.words + first * p.row_words, p.zeros + first * p.row_zeros,
                         tiles.size(i)};
      for (int64_t panel = begin; panel < end; ++panel) {
        const uint8_t* data = weights + panel * bytes;
        const int64_t done = i * (end - begin) + panel - begin;
        const Ahead ahead{next + done * bytes / tiles.count, tiles.count};
        fetch_outputs(a, panel, first, tile.rows);
        tiles.count == 1 && dot_vecs(tile.rows) < kPanelVecs
            ? dot_tile<D, kStreamSteps>(a.weight, data, panel, tile, ahead, total)
            : dot_tile<D, kBlockSteps>(a.weight, data, panel, tile, ahead, total);
        for (int r = 0; r < tile.rows; ++r) {
          const float scale = p.row_scale == nullptr ? 1.0f : p.row_scale[first + r];
          finish_row(a, panel, first + r, scale, total + r * kPanel);
        }
      }
    }
  }
}

// Writes `count` inputs of a row, rounded already, as every `stride`-th word, and what the sums of their
// chunks start at.
inline void place_bytes(const float* x, int64_t count, int64_t stride, bool four, int32_t* words,
                        int32_t* zeros) {
  int8_t bytes[kPrepareInputs];
  for (int64_t k = 0; k < count; ++k) bytes[k] = static_cast<int8_t>(x[k]);
  if (four || Int8Dot::kWords == 1) {
    for (int64_t i = 0; i < count / 4; ++i) memcpy(words + i * stride, bytes + i * 4, 4);
  } else {
    for (int64_t i = 0; i < count / 2; ++i) {
      const int8_t* from = bytes + i / 2 * 4 + i % 2;
      const int16_t pair[2] = {from[0], from[2]};
      memcpy(words + i * stride, pair, 4);
    }
  }
  const int64_t chunk = four ? 8 * Int4Dot::kChunk : 4 * Int8Dot::kChunk;  // inputs
  static_assert(kPrepareInputs % (4 * Int8Dot::kChunk) == 0, "chunks are placed whole");
  const bool pairs = four && Int4Dot::kPairs;
  for (int64_t first = 0; first < count; first += chunk, zeros += stride) {
    const int32_t zero = four ? -Int4Dot::kZero : -Int8Dot::kZero;
    const int64_t end = smaller(first + chunk, count);
    int32_t sum = 0, lower = 0;  // lower: of inputs 0 and 1 of each word
    for (int64_t k = first; k < end; ++k) sum += bytes[k];
    for (int64_t k = first; pairs && k < end; k += 4) lower += bytes[k] + bytes[k + 1];
    const int16_t halves[2] = {static_cast<int16_t>(zero * lower),
                               static_cast<int16_t>(zero * (sum - lower))};
    *zeros = zero * sum;
    if (pairs) memcpy(zeros, halves, 4);
  }
}

// Writes `count` inputs of a row as bfloat16, two in every `stride`-th word.
inline void place_halves(const float* x, int64_t count, int64_t stride, int32_t* words) {
  bf16 halves[kPrepareInputs];
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(halves + i, load(x + i));
  if (i < count) store_some(halves + i, load_some(x + i, count - i), count - i);
  for (i = 0; i < count / 2; ++i) memcpy(words + i * stride, halves + 2 * i, 4);
}

// Whether dot products take that weight. Sums of 8-bit integers are exact, so that more rows may go another
// way, as they do with AVX2, where a widened block serves them faster; those of 4 bits are floats times
// scales in the end, a chunk after the other, for all rows alike.
inline bool uses_dots(const llama_ops_linear_weight& w, int64_t rows) {
  const bool whole_chunks = w.groups == 1 || w.inputs / w.groups % 32 == 0;
  switch (w.kind) {
    case LLAMA_OPS_LINEAR_BF16: return kHasDots;
    case LLAMA_OPS_LINEAR_INT8: return w.groups == 1 && (kWidth == 16 || rows <= 2 * kDotRows);
    default: return w.kind == LLAMA_OPS_LINEAR_INT4 && whole_chunks;
  }
}

inline void dot_part(const llama_ops_linear_args& a, int thread, int threads) {
#if defined(LLAMA_OPS_EMULATE) || defined(__AVX512VNNI__)
  if (a.weight.kind == LLAMA_OPS_LINEAR_BF16) return dot_panels<Bf16Dot, float>(a, thread, threads);
#endif
  if (a.weight.kind == LLAMA_OPS_LINEAR_INT8) return dot_panels<Int8Dot, int32_t>(a, thread, threads);
  a.weight.groups == 1 ? dot_panels<Int4Dot, int32_t>(a, thread, threads)
                       : dot_panels<Int4Dot, float>(a, thread, threads);
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops

#endif  // __AVX2__
