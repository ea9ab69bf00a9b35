// What attends for a tile of csrc/cpu/paged_attention.cc, to a chunk of keys at a time.
//
// Tiles of few rows and of many add up in one order, so that a token's bits do not depend on how many
// are beside it: scores dimension after dimension, values key after key, exponentials in kWidth sums,
// of every kWidth-th key each, which are then folded in halves. Keys past a row's own change nothing in
// it, be they infinite or no numbers.
//
// Integers are multiplied as they are: a key's scale multiplies its finished score, a value's the weight.
#pragma once

#include "cpu/paged_cache.h"
#include "cpu/paged_tiles.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {
namespace paged {

// Words of four bytes of the cache: one dimension, two, or four.
template <class T>
struct Words;
template <>
struct Words<float> {
  static constexpr int kEach = 1;
  static inline Vec part(Vec word, int) { return word; }
};
template <>
struct Words<bf16> {
  static constexpr int kEach = 2;
  static inline Vec part(Vec word, int i) {
    return i == 0 ? (Vec)((BitVec)word << 16) : (Vec)((BitVec)word & 0xffff0000u);
  }
};

template <>
struct Words<int8_t> {
  static constexpr int kEach = 4;
  static inline Vec part(Vec word, int i) {
    return __builtin_convertvector(((IntVec)word << (24 - 8 * i)) >> 24, Vec);
  }
};

// What attends for the rows of a tile that share a key head; with few rows, for several key heads
// together, since their keys lie side by side. T is how the cache stores numbers.
template <class T>
class TileWork {
 public:
  using Args = llama_ops_paged_attention_args;

  // Numbers of memory that work on tiles of so many rows needs.
  static int64_t memory_size(const Args& a, int64_t rows) {
    return query_size(a, rows) + score_size(a) + 2 * kManyKeys * padded(a.dim) + rows +
           2 * (kFewKeys + kAhead);
  }

  TileWork(const Args& args, const Tile& work, int64_t first, int64_t count, int64_t most_rows,
           float* memory)
      : a(args), tile(work), group(first), groups(count), dim(padded(args.dim)),
        head(stored<T>(args.dim)) {
    offsets = reinterpret_cast<int64_t*>(memory);
    queries = memory + 2 * (kFewKeys + kAhead);
    scores = queries + query_size(a, most_rows);
    keys = scores + score_size(a);
    values = keys + kManyKeys * dim;
    limits = reinterpret_cast<int32_t*>(values + kManyKeys * dim);
    k_cache = static_cast<const T*>(a.k_cache) + group * head;
    v_cache = static_cast<const T*>(a.v_cache) + group * head;
  }

  // Rotates and scales the queries, and lays them out as the products want them.
  void load_queries() {
    const int64_t shared = a.heads / a.groups;
    for (int64_t row = 0; row < tile.padded_rows; ++row) {
      // Padding repeats the last row: whatever it gives is finite where that is, and not used.
      const int64_t real = smaller(row, tile.rows - 1), token = tile.first + real / shared;
      limits[row] = a.position[token];
      if (tile.rows > kFew) {
        load_query(token, group * shared + real % shared, keys + row % kWidth * dim);
        if ((row + 1) % kWidth == 0) load_columns(row + 1 - kWidth);
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        load_query(token, (group + g) * shared + real % shared, queries + (g * kFew + row) * dim);
      }
    }
  }

  // Attends to one chunk of keys.
  void attend(int64_t chunk, const Results& parts) {
    const int64_t begin = chunk * tile.chunk, count = smaller(tile.chunk, tile.keys - begin);
    locate(begin, count);
    if (tile.rows > kFew) {
      attend_many(chunk, begin, count, parts[0]);
    } else if (tile.padded_rows == 1) {
      attend_few<1>(begin, count, parts);
    } else if (tile.padded_rows == 2) {
      attend_few<2>(begin, count, parts);
    } else if (tile.padded_rows == 4) {
      attend_few<4>(begin, count, parts);
    } else {
      attend_few<kFew>(begin, count, parts);
    }
  }

 private:
  static int64_t query_size(const Args& a, int64_t rows) {
    return padded(a.dim) * larger(rows, a.groups * kFew);
  }
  static int64_t score_size(const Args& a) {
    return larger<int64_t>(a.groups * kFewKeys * kFew, kManyKeys * kPanel);
  }

  int64_t panel_width(int64_t first) const { return smaller(kPanel, tile.padded_rows - first); }

  // One query, rotated where tables are given, scaled and padded with zeros.
  void load_query(int64_t token, int64_t head, float* to) const {
    const int64_t half = a.dim / 2;
    const float scale = 1.0f / sqrtf(static_cast<float>(a.dim));
    const float* q = a.q + token * a.q_stride + head * a.dim;
    if (a.cos != nullptr) {
      turn_head(q, a.cos + token * half, a.sin + token * half, half, to);
      q = to;
    }
    for (int64_t d = 0; d < a.dim; ++d) to[d] = q[d] * scale;
    for (int64_t d = a.dim; d < dim; ++d) to[d] = 0.0f;
  }

  // Lays out kWidth queries from `row` on as columns of their panel.
  void load_columns(int64_t row) {
    const int64_t panel = row / kPanel * kPanel, width = panel_width(panel);
    float* to = queries + panel * a.dim + (row - panel);
    for (int64_t d = 0; d < a.dim; d += kWidth) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load(keys + i * dim + d);
      transpose(block);
      for (int i = 0; i < smaller<int64_t>(kWidth, a.dim - d); ++i) {
        store(to + (d + i) * width, block[i]);
      }
    }
  }

  // Finds where positions lie in the cache; those past the last repeat it.
  void locate(int64_t begin, int64_t count) {
    const int32_t* table = a.block_table + a.sequence[tile.first] * a.table_width;
    const int64_t size = a.groups * head;
    int64_t number = begin / a.block, within = begin % a.block;
    for (int64_t i = 0; i < count; ++number, within = 0) {
      int64_t offset = (table[number] * a.block + within) * size;
      for (; within < a.block && i < count; ++within, ++i, offset += size) offsets[i] = offset;
    }
    for (int64_t i = count; i < kFewKeys + kAhead; ++i) offsets[i] = offsets[count - 1];
  }

  void attend_many(int64_t chunk, int64_t begin, int64_t count, const Result& part) {
    for (int64_t i = 0; i < count; ++i) {
      copy_wide(k_cache + offsets[i], a.dim, keys + i * dim);
      copy_wide(v_cache + offsets[i], a.dim, values + i * dim);
    }
    for (int64_t row = first_row(a, tile, chunk); row < tile.rows; row += kPanel) {
      const int64_t width = panel_width(row), rows = smaller(kPanel, tile.rows - row);
      const int64_t seen = smaller<int64_t>(count, limits[row + rows - 1] + 1 - begin);
      product<false>(keys, dim, queries + row * a.dim, width, seen, width, a.dim, scores, width);
      for (int64_t lane = 0; lane < width; lane += kWidth) {
        softmax(row, lane, width, begin, seen, part);
      }
      float* out = part.out + row * dim;
      const int64_t common = larger<int64_t>(0, limits[row] + 1 - begin);
      if (finite(v_cache, common, seen)) {
        product<true>(scores, width, values, dim, rows, dim, seen, out, dim);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t own = limits[row + r] + 1 - begin;
        product<true>(scores + r, width, values, dim, 1, dim, larger<int64_t>(0, own),
                      out + r * dim, dim);
      }
    }
  }

  // Whether the values of keys [begin, end) of the chunk are numbers. Where some rows do not see them
  // they are multiplied by 0, which would make NaN of others.
  bool finite(const T* cache, int64_t begin, int64_t end) const {
    Vec nothing{};
    for (int64_t key = begin; key < end; ++key) {
      if constexpr (kScaled<T>) {
        const float scale = scale_behind(cache + offsets[key], a.dim);
        nothing += splat(scale - scale);
        continue;
      }
      for (int64_t d = 0; d < a.dim; d += kWidth) {
        const T* from = cache + offsets[key] + d;
        const Vec value = d + kWidth <= a.dim ? load(from) : load_some(from, a.dim - d);
        nothing += value - value;
      }
    }
    return sum(nothing) == 0.0f;
  }

  // A score or a weight times the scale of the head at `from`, where it has one.
  Vec scaled(Vec x, const T* from) const {
    if constexpr (kScaled<T>) {
      return x * scale_behind(from, a.dim);
    } else {
      return x;
    }
  }

  // Scales of kWidth heads at these offsets.
  Vec scales(const T* cache, const int64_t* at) const {
    float found[kWidth];
    for (int j = 0; j < kWidth; ++j) found[j] = scale_behind(cache + at[j], a.dim);
    return load(found);
  }

  // Turns scores [seen, width] of the vector of rows at row + lane into exponentials.
  void softmax(int64_t row, int64_t lane, int64_t width, int64_t begin, int64_t seen,
               const Result& part) {
    float* column = scores + lane;
    IntVec limit;
    memcpy(&limit, limits + row + lane, sizeof limit);
    Vec most = splat(kHidden), totals[kWidth] = {};
    for (int64_t key = 0; kScaled<T> && key < seen; ++key) {
      store(column + key * width, scaled(load(column + key * width), k_cache + offsets[key]));
    }
    if (begin + seen - 1 > limits[row + lane]) {
      for (int64_t key = 0; key < seen; ++key) {
        const IntVec at = IntVec{} + static_cast<int32_t>(begin + key);
        store(column + key * width, at > limit ? splat(kHidden) : load(column + key * width));
      }
    }
    for (int64_t key = 0; key < seen; ++key) most = maximum(load(column + key * width), most);
    for (int64_t first = 0; first < seen; first += kWidth) {
      for (int64_t i = 0; i < smaller<int64_t>(kWidth, seen - first); ++i) {
        const Vec weight = exp(load(column + (first + i) * width) - most);
        store(column + (first + i) * width, scaled(weight, v_cache + offsets[first + i]));
        totals[i] += weight;
      }
    }
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) totals[i] += totals[i + half];
    }
    store(part.most + row + lane, most);
    store(part.total + row + lane, totals[0]);
  }

  template <int kRows>
  void attend_few(int64_t begin, int64_t count, const Results& parts) {
    for (int64_t first = 0; first < count; first += kWidth) {
      for (int64_t g = 0; g < groups; ++g) {
        few_scores<kRows>(g, offsets + first, scores + g * kFewKeys * kFew + first);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      few_softmax<kRows>(g, begin, count, parts[g]);
    }
    for (int64_t first = 0; first < count; first += kBatch) {
      const int64_t end = smaller(count, first + kBatch);
      for (int64_t g = 0; g < groups; ++g) few_batch<kRows>(g, first, end, parts[g].out);
    }
    const int64_t common = larger<int64_t>(0, limits[0] + 1 - begin);
    for (int64_t g = 0; g < groups; ++g) {
      if (!finite(v_cache + g * head, common, count)) few_apart<kRows>(g, begin, parts[g].out);
    }
  }

  // Scores of kWidth keys with all rows, into [rows, kFewKeys]; keys are lanes. They go by a line each:
  // those of a head may lie so far apart that two lines of each would not stay in the L1 cache.
  template <int kRows>
  void few_scores(int64_t g, const int64_t* at, float* to) const {
    constexpr int kFour = 4 * Words<T>::kEach, kLine = 4 * kFour;
    const T* cache = k_cache + g * head;
    const float* q = queries + g * kFew * dim;
    Vec sums[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[r] = Vec{};
    const int64_t whole = a.dim / kFour * kFour;
    for (int64_t line = 0; line < whole; line += kLine) {
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) __builtin_prefetch(cache + at[j + kAhead] + line);
      for (int64_t d = line; d < smaller(whole, line + kLine); d += kFour) {
        add_four<kRows>(cache + d, at, q + d, sums);
      }
    }
    for (int64_t d = whole; d < a.dim; ++d) {
      float key[kWidth];
      for (int j = 0; j < kWidth; ++j) key[j] = widen(cache[at[j] + d]);
      for (int r = 0; r < kRows; ++r) sums[r] += load(key) * splat(q[r * dim + d]);
    }
    if constexpr (kScaled<T>) {
      const Vec scale = scales(cache, at);
      for (int r = 0; r < kRows; ++r) sums[r] *= scale;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(to + r * kFewKeys, sums[r]);
  }

  // Adds the products of four words of kWidth keys, `cache` being where the first would lie at offset 0,
  // to the rows' sums.
  template <int kRows>
  inline __attribute__((always_inline)) void add_four(const T* cache, const int64_t* at,
                                                      const float* q, Vec* sums) const {
    constexpr int kEach = Words<T>::kEach;
    Vec words[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      words[i] = fours([&](int four) __attribute__((always_inline)) {
        return load_four(cache + at[4 * four + i]);
      });
    }
    turn_fours(words);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int i = 0; i < kEach; ++i) {
        const Vec key = Words<T>::part(words[j], i);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r] += key * splat(q[r * dim + j * kEach + i]);
      }
    }
  }

  // Turns scores of so many keys into exponentials, those of hidden keys into zero.
  template <int kRows>
  void few_softmax(int64_t g, int64_t begin, int64_t count, const Result& part) const {
    float* of = scores + g * kFewKeys * kFew;
    float mosts[kWidth] = {}, totals[kWidth] = {}, of_values[kScaled<T> ? kFewKeys : 1];
    for (int64_t i = 0; kScaled<T> && i < count; i += kWidth) {
      if constexpr (kScaled<T>) store(of_values + i, scales(v_cache + g * head, offsets + i));
    }
    IntVec lanes;
    for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
    for (int r = 0; r < kRows; ++r, of += kFewKeys) {
      const int64_t seen = smaller<int64_t>(count, limits[r] + 1 - begin);
      const int64_t vectors = (count + kWidth - 1) / kWidth;
      for (int64_t i = larger<int64_t>(0, seen / kWidth); i < vectors; ++i) {
        const IntVec at = lanes + static_cast<int32_t>(i * kWidth);
        const IntVec first_hidden = IntVec{} + static_cast<int32_t>(seen);
        store(of + i * kWidth, at >= first_hidden ? splat(kHidden) : load(of + i * kWidth));
      }
      Vec most = splat(kHidden), total{};
      for (int64_t i = 0; i < vectors; ++i) most = maximum(load(of + i * kWidth), most);
      mosts[r] = largest(most);
      most = splat(mosts[r]);
      for (int64_t i = 0; i < vectors; ++i) {
        const Vec weight = exp(load(of + i * kWidth) - most);
        total += weight;
        if constexpr (kScaled<T>) {
          store(of + i * kWidth, weight * load(of_values + i * kWidth));
        } else {
          store(of + i * kWidth, weight);
        }
      }
      totals[r] = sum(total);
    }
    store(part.most, load(mosts));
    store(part.total, load(totals));
  }

  // Adds the weighted values of some keys to the output, which the first key starts.
  template <int kRows>
  void few_batch(int64_t g, int64_t first, int64_t end, float* out) const {
    constexpr int kVecs = (kWidth == 16 ? 16 : 8) / kRows;  // sums of a row that fit in registers
    int64_t d = 0;
    if constexpr (kVecs >= 4) {
      for (; d + 4 * kWidth <= a.dim; d += 4 * kWidth) few_values<kRows, 4>(g, first, end, d, out);
    }
    if constexpr (kVecs >= 2) {
      for (; d + 2 * kWidth <= a.dim; d += 2 * kWidth) few_values<kRows, 2>(g, first, end, d, out);
    }
    for (; d < a.dim; d += kWidth) few_values<kRows, 1>(g, first, end, d, out);
  }

  template <int kRows, int kVecs>
  void few_values(int64_t g, int64_t first, int64_t end, int64_t d, float* out) const {
    const T* cache = v_cache + g * head + d;
    const float* weights = scores + g * kFewKeys * kFew;
    const int64_t columns = smaller<int64_t>(kVecs * kWidth, a.dim - d);
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        sums[r][v] = first == 0 ? Vec{} : load(out + r * dim + d + v * kWidth);
      }
    }
    for (int64_t i = first; i < end; ++i) {
      Vec row[kVecs];
      const T* from = cache + offsets[i];
      const T* later = cache + offsets[i + kAhead];
      for (int v = 0; v < kVecs; ++v) {
        __builtin_prefetch(later + v * kWidth);
        row[v] = columns == kVecs * kWidth ? load(from + v * kWidth) : load_some(from, columns);
      }
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kFewKeys + i];
        for (int v = 0; v < kVecs; ++v) sums[r][v] += weight * row[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) store(out + r * dim + d + v * kWidth, sums[r][v]);
    }
  }

  // Weights the values of the keys that each row sees, of no others.
  template <int kRows>
  void few_apart(int64_t g, int64_t begin, float* out) const {
    const T* cache = v_cache + g * head;
    const float* weights = scores + g * kFewKeys * kFew;
    for (int r = 0; r < kRows; ++r) {
      const int64_t own = smaller<int64_t>(tile.keys, limits[r] + 1) - begin;
      for (int64_t d = 0; d < a.dim; d += kWidth) {
        Vec sums{};
        for (int64_t i = 0; i < smaller(own, kFewKeys); ++i) {
          const T* from = cache + offsets[i] + d;
          const Vec value = d + kWidth <= a.dim ? load(from) : load_some(from, a.dim - d);
          sums += weights[r * kFewKeys + i] * value;
        }
        store(out + r * dim + d, sums);
      }
    }
  }

  const Args& a;
  const Tile& tile;
  const int64_t group, groups;  // the first key head, and how many there are
  const int64_t dim;            // padded to vectors
  const int64_t head;           // numbers from one head in the cache to the next
  const T* k_cache;             // of the first key head
  const T* v_cache;
  int64_t* offsets;  // of the chunk's keys in the caches
  float* queries;    // few rows: [groups, kFew, dim]; many: panels of [a.dim, width]
  float* scores;     // [groups, kFew, kFewKeys]; many: [keys, width]
  float* keys;       // [kManyKeys, dim]
  float* values;     // [kManyKeys, dim]
  int32_t* limits;   // [rows], the last position that each sees
};

}  // namespace paged
}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
