// What the forward and the backward pass of attention share: tiles, packed operands, products.
//
// A task works on one key/value head of one batch row. The queries of all R heads that share it are
// one list, position by position: entry i is head i % R at position i / R. So keys and values are
// packed once for R heads. Products are of blocks of kBlock rows by kPanel columns, whose sums stay
// in registers; right factors lie in panels or in rows of `stride` numbers.
#pragma once

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/simd.h"
#include "llama_ops/flash_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {
namespace attention {

constexpr int kBlock = 6;                       // rows whose sums are kept in registers
constexpr int kVectors = kWidth == 16 ? 4 : 2;  // and vectors in each: 24 of 32 or 12 of 16
constexpr int kPanel = kVectors * kWidth;       // columns of a product
constexpr int kQueries = 96;                    // of a tile; multiple of kBlock

// Numbers between rows of scores of so many keys: no power of two.
constexpr int scores_stride(int keys) { return keys + 16; }
constexpr double kLog2e = 1.4426950408889634;

using Forward = llama_ops_flash_attention_forward_args;

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Numbers between packed rows of `size`: whole vectors, and an odd number of them where there are
// many, since powers of two would fall into few sets of the cache.
inline int64_t row_stride(int64_t size) {
  const int64_t vectors = (size + kWidth - 1) / kWidth;
  return (vectors > kVectors ? vectors | 1 : vectors) * kWidth;
}

// 2^x for x <= 0 with a relative error below 2e-7; 0 below -100 and for NaN. The polynomial is the
// minimax one of degree 5 on [-1/2, 1/2] that is exact at 0.
inline Vec exp2_negative(Vec x) {
#if defined(__AVX512F__)
  // (The form without a mask makes GCC 12 warn of its own header.)
  const __m512 whole =
      _mm512_maskz_roundscale_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec f = x - (Vec)whole;
#else
  const Vec clipped = x > -127.0f ? x : Vec{} - 127.0f;
  const float to_nearest = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec whole = (clipped + to_nearest) - to_nearest;
  const Vec f = clipped - whole;
#endif
  Vec p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f), _CMP_GT_OQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)p, whole);
#else
  const Vec power = (Vec)((__builtin_convertvector(whole, IntVec) + 127) << 23);
  return x > -100.0f ? p * power : Vec{};
#endif
}

// Sum and maximum of a vector's lanes by exchanges, so that several can be under way at once.
inline Vec exchange(Vec x, int distance) {
  IntVec lanes;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane ^ distance;
  return __builtin_shuffle(x, lanes);
}
inline float sum_lanes(Vec x) {
#pragma GCC unroll 4
  for (int distance = kWidth / 2; distance > 0; distance /= 2) x += exchange(x, distance);
  return x[0];
}
inline float largest_lane(Vec x) {
#pragma GCC unroll 4
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    x = maximum(x, exchange(x, distance));
  }
  return x[0];
}

// The numbers of a call, and where one (batch row, key/value head) lies in it.
struct Item {
  const Forward& a;
  int64_t row, group;

  int64_t shared() const { return a.heads / a.groups; }
  // Of differences of scores, to exponents of 2. Scores stay as the products of queries and keys give
  // them: scaled beforehand, large ones would be rounded once more, and their weights be that far off.
  float exponents() const { return static_cast<float>(a.scale * kLog2e); }
  int64_t entries() const { return a.queries * shared(); }
  int64_t position(int64_t entry) const { return entry / shared(); }
  int64_t query_offset(int64_t entry) const {
    const int64_t head = group * shared() + entry % shared();
    return ((row * a.queries + position(entry)) * a.heads + head) * a.size;
  }
  int64_t lse_offset(int64_t entry) const {
    const int64_t head = group * shared() + entry % shared();
    return (row * a.heads + head) * a.queries + position(entry);
  }
  int64_t key_offset(int64_t key) const {
    return ((row * a.keys + key) * a.groups + group) * a.size;
  }
  const int32_t* segments() const { return a.segments ? a.segments + row * a.queries : nullptr; }
  const int32_t* key_segments() const {
    return a.segments ? a.key_segments + row * a.keys : nullptr;
  }
  // Keys before this one are seen by an entry, segments aside.
  int64_t limit(int64_t entry) const {
    return smaller(a.prefix + position(entry) + 1, a.keys);
  }
  // The first entry that sees a key, segments aside.
  int64_t first_entry(int64_t key) const { return larger<int64_t>(key - a.prefix, 0) * shared(); }
};

inline int64_t items(const Forward& a) { return a.batch * a.groups; }
inline Item item(const Forward& a, int64_t index) {
  return {a, index / a.groups, index % a.groups};
}

// A tile of entries or of keys.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Span span(int64_t index, int64_t each, int64_t count) {
  return {index * each, smaller((index + 1) * each, count)};
}

struct Extent {  // of segments
  int32_t least, most;
  bool meets(const Extent& other) const { return least <= other.most && other.least <= most; }
  bool uniform() const { return least == most; }
};
inline Extent extent(const int32_t* segments, int64_t begin, int64_t end) {
  Extent found{segments[begin], segments[begin]};
  for (int64_t i = begin + 1; i < end; ++i) {
    found.least = smaller(found.least, segments[i]);
    found.most = larger(found.most, segments[i]);
  }
  return found;
}

enum Seen { kNone, kSome, kAll };

// How much of a tile of keys, `full` of them but at the end, a tile of entries sees.
inline Seen visible(const Item& item, const Span& entries, const Span& keys, int64_t full) {
  if (item.limit(entries.end - 1) <= keys.begin) return kNone;
  const bool whole = item.limit(entries.begin) >= keys.end && keys.size() == full;
  if (item.segments() == nullptr) return whole ? kAll : kSome;
  const Extent asking =
      extent(item.segments(), item.position(entries.begin), item.position(entries.end - 1) + 1);
  if (asking.most < 0) return kNone;
  const Extent asked = extent(item.key_segments(), keys.begin, keys.end);
  if (asked.least == LLAMA_OPS_EVERY_SEGMENT) {
    return whole && asked.uniform() && asking.least >= 0 ? kAll : kSome;
  }
  if (!asking.meets(asked)) return kNone;
  return whole && asking.uniform() && asked.uniform() ? kAll : kSome;
}

// Writes `value` over the scores of one entry that it does not see, up to column `end`.
inline void hide(const Item& item, int64_t entry, const Span& keys, int64_t end, float value,
                 float* scores) {
  int64_t limit = smaller(item.limit(entry), keys.end) - keys.begin;
  const int32_t* segments = item.segments();
  if (segments != nullptr) {
    const int32_t own = segments[item.position(entry)];
    if (own < 0) limit = 0;
    const int32_t* others = item.key_segments() + keys.begin;
    for (int64_t j = 0; j < limit; ++j) {
      const bool seen = others[j] == own || others[j] == LLAMA_OPS_EVERY_SEGMENT;
      scores[j] = seen ? scores[j] : value;
    }
  }
  for (int64_t j = larger<int64_t>(limit, 0); j < end; ++j) scores[j] = value;
}

// Asks for a row to be brought into the second-level cache. Rows of one head lie apart, which the
// processor's own prefetching does not follow.
template <class T>
inline void prefetch_row(const T* row, int64_t size) {
  const int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += line) __builtin_prefetch(row + i, 0, 2);
}

// Copies a row, scaled, and fills it up with zeros to `stride`.
template <class T>
inline void pack_row(const T* from, int64_t size, int64_t stride, float scale, float* to) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(to + i, load(from + i) * scale);
  for (int64_t i = whole; i < stride; ++i) to[i] = i < size ? widen(from[i]) * scale : 0.0f;
}

// Copies the first numbers of a packed row, scaled.
template <class T>
inline void unpack_row(const float* from, int64_t size, float scale, T* to) {
  const int64_t whole = size / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) store(to + i, load(from + i) * scale);
  for (int64_t i = whole; i < size; ++i) narrow(from[i] * scale, to + i);
}

// Packs rows from `first` on of k or v as a panel [size][kPanel]; columns past the last key are 0.
template <class T>
void pack_panel(const Item& item, const T* from, int64_t first, float* to) {
  const int64_t size = item.a.size, whole = size / kWidth * kWidth;
  for (int part = 0; part < kVectors; ++part) {
    const T* rows[kWidth];
    const int64_t start = first + part * kWidth;
    const int64_t count = smaller<int64_t>(item.a.keys - start, kWidth);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = from + item.key_offset(start + i);
      if (start + i + kWidth < item.a.keys) {
        prefetch_row(from + item.key_offset(start + i + kWidth), size);
      }
    }
    for (int64_t d = 0; d < whole; d += kWidth) {
      Vec block[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) block[i] = i < count ? load(rows[i] + d) : Vec{};
      transpose(block);
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kPanel + part * kWidth, block[i]);
    }
    for (int64_t d = whole; d < size; ++d) {
      for (int64_t i = 0; i < kWidth; ++i) {
        to[d * kPanel + part * kWidth + i] = i < count ? widen(rows[i][d]) : 0.0f;
      }
    }
  }
}

// What products after this one read. They ask for it on the way, a line of the cache a step: asked
// for at once, so many lines would keep loads waiting.
class Ahead {
 public:
  // Lines from `at` on, to be asked for in step i; with step 0, the same one for ever.
  struct Lines {
    const float* at;
    int64_t step;
    void operator()(int64_t i) const { __builtin_prefetch(at + i * step, 0, 2); }
  };
  void add(const float* from, int64_t numbers) {
    parts[count].at = from;
    parts[count++].end = from + numbers;
  }
  // What a product of so many steps is to ask for; `known` is in the cache.
  Lines take(int64_t steps, const float* known) {
    while (part < count && parts[part].at >= parts[part].end) ++part;
    if (part == count) return {known, 0};
    const float* at = parts[part].at;
    parts[part].at += steps * kLine;
    return {at, kLine};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);
  struct {
    const float *at, *end;
  } parts[8];
  int part = 0, count = 0;
};

// to[kBlock][.] = to * decay + left * right for V vectors of columns; decay is one number per row,
// or null for 1.
template <int V, bool kTurned>
inline void accumulate(const float* left, int64_t left_stride, const float* right, int64_t stride,
                       int64_t depth, const float* decay, float* to) {
  const auto end = [=](int r, int v, Vec sum) __attribute__((always_inline)) {
    store(to + r * stride + v * kWidth, sum);
  };
  if (decay == nullptr) {
    const auto begin = [=](int r, int v) __attribute__((always_inline)) {
      return load(to + r * stride + v * kWidth);
    };
    multiply<kBlock, V, kTurned>(left, left_stride, right, stride, depth, begin, end, NothingAhead());
  } else {
    const auto begin = [=](int r, int v) __attribute__((always_inline)) {
      return load(to + r * stride + v * kWidth) * decay[r];
    };
    multiply<kBlock, V, kTurned>(left, left_stride, right, stride, depth, begin, end, NothingAhead());
  }
}

// Calls body(first, V) for the panels into which rows of `size` numbers are cut, as even as they
// go, with V as a constant.
template <int V>
struct Count {
  static constexpr int value = V;
};
template <class Body>
inline void for_panels(int64_t size, const Body& body) {
  const int64_t vectors = (size + kWidth - 1) / kWidth;
  const int64_t panels = (vectors + kVectors - 1) / kVectors;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t begin = vectors * p / panels, end = vectors * (p + 1) / panels;
    switch (end - begin) {
      case 1: body(begin * kWidth, Count<1>()); break;
      case 2: body(begin * kWidth, Count<2>()); break;
#if LLAMA_OPS_WIDTH == 16
      case 3: body(begin * kWidth, Count<3>()); break;
      default: body(begin * kWidth, Count<4>());
#endif
    }
  }
}

// How many items go together, their packed operands (`numbers` for each) side by side: few, so that
// these stay in the cache, but one for each thread.
inline int64_t wave(int64_t items, int64_t numbers) {
  const int64_t threads = omp_get_max_threads();
  const int64_t fitting = (1 << 18) / larger<int64_t>(numbers * threads, 1);
  return smaller(items, larger<int64_t>(fitting, 1) * threads);
}

// Hands out tasks in order; which thread gets one has no influence on its result.
inline int64_t next(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

}  // namespace attention
}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
