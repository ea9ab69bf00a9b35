// Attention backward; see llama_ops/flash_attention.h and cpu/flash_attention.h.
//
// Weights are computed again from the saved logarithms of their sums, tile by tile. The gradients
// of keys and values add up over tiles of entries, those of queries over tiles of keys, both in
// ascending order, whichever loop is the outer one: so results do not depend on the threads.
#include "cpu/flash_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

using namespace attention;

constexpr int kKeys = 192;  // of a tile; multiple of kBlock and of kPanel
constexpr int kScores = scores_stride(kKeys);

using Backward = llama_ops_flash_attention_backward_args;

// Where the operands of an item lie: panels of keys and of values, and keys row by row.
struct Packed {
  float *keys, *values, *key_rows;
};

struct Sizes {
  int64_t stride, panels, numbers;
  explicit Sizes(const Forward& a)
      : stride(row_stride(a.size)),
        panels((a.keys + kPanel - 1) / kPanel),
        numbers(panels * kPanel * (2 * a.size + stride)) {}
  Packed at(const Forward& a, float* memory, int64_t index) const {
    float* keys = memory + index * numbers;
    float* values = keys + panels * kPanel * a.size;
    return {keys, values, values + panels * kPanel * a.size};
  }
};

template <class T>
void pack(const Item& item, const Sizes& sizes, const Packed& to, int64_t panel) {
  const Forward& a = item.a;
  const int64_t first = panel * kPanel, end = smaller(first + kPanel, a.keys);
  const T* k = static_cast<const T*>(a.k);
  pack_panel(item, k, first, to.keys + first * a.size);
  pack_panel(item, static_cast<const T*>(a.v), first, to.values + first * a.size);
  for (int64_t key = first; key < end; ++key) {
    pack_row(k + item.key_offset(key), a.size, sizes.stride, 1.0f,
             to.key_rows + key * sizes.stride);
  }
}

// Gradients of keys and values that add up; row 0 belongs to key `first`.
struct Sums {
  float *keys, *values;
  int64_t first;
};

// What is computed of a tile of entries with a tile of keys.
struct Wanted {
  bool queries, keys;
};

struct Tile {
  Span entries;
  float *queries, *grads, *of_queries;  // [kQueries][stride]
  float lse[kQueries], lse_rest[kQueries], product[kQueries];  // lse and what it lacks, unscaled
  int64_t seen[kQueries / kBlock];      // columns of the present tile of keys, by block
  int64_t blocks() const { return (entries.size() + kBlock - 1) / kBlock; }
};

// Tiles of entries that go through the keys together: a tile of keys with the sums of its gradients
// fills most of the second-level cache and stays there for all of them.
constexpr int kTogether = 8;

struct Task {
  const Item& item;
  const Backward& a;
  const Sizes& sizes;
  const Packed& packed;
  float *weights, *of_scores;  // [kQueries][kScores], of the present pair of tiles
  Tile tiles[kTogether];
  int64_t count;  // of tiles in use

  Task(const Item& item, const Backward& a, const Sizes& sizes, const Packed& packed)
      : item(item), a(a), sizes(sizes), packed(packed), count(0) {
    const int64_t each = kQueries * sizes.stride, scores = kQueries * kScores;
    const int64_t numbers = kTogether * 3 * each + 2 * scores;
    weights = static_cast<float*>(scratch(1, numbers * sizeof(float)));
    memset(weights, 0, 2 * scores * sizeof(float));
    of_scores = weights + scores;
    float* memory = of_scores + scores;
    for (Tile& tile : tiles) {
      tile.queries = memory;
      tile.grads = memory + each;
      tile.of_queries = memory + 2 * each;
      memory += 3 * each;
    }
  }
};

// In two numbers: the error of one would be that of all weights of the row.
void find_lse(const Item& item, int64_t row, Tile& tile) {
  const int64_t offset = item.lse_offset(tile.entries.begin + row);
  const bool seen = item.a.lse[offset] != -INFINITY;
  const double sum = item.a.lse[offset] + static_cast<double>(item.a.lse_rest[offset]);
  const double lse = sum / item.a.scale;
  tile.lse[row] = seen ? static_cast<float>(lse) : INFINITY;
  tile.lse_rest[row] = seen ? static_cast<float>(lse - tile.lse[row]) : 0.0f;
}

template <class T>
void load_entries(const Task& task, const Span& entries, Tile& tile) {
  const Item& item = task.item;
  tile.entries = entries;
  const int64_t stride = task.sizes.stride, rows = tile.blocks() * kBlock;
  memset(tile.of_queries, 0, rows * stride * sizeof(float));
  for (int64_t row = 0; row < entries.size(); ++row) {
    const int64_t offset = item.query_offset(entries.begin + row);
    float* grad = tile.grads + row * stride;
    pack_row(static_cast<const T*>(item.a.q) + offset, item.a.size, stride, 1.0f,
             tile.queries + row * stride);
    pack_row(static_cast<const T*>(task.a.grad_out) + offset, item.a.size, stride, 1.0f, grad);
    const T* out = static_cast<const T*>(item.a.out) + offset;
    const int64_t whole = item.a.size / kWidth * kWidth;
    Vec products{};
    for (int64_t d = 0; d < whole; d += kWidth) products += load(out + d) * load(grad + d);
    float product = sum(products);
    for (int64_t d = whole; d < item.a.size; ++d) product += widen(out[d]) * grad[d];
    tile.product[row] = product;
    find_lse(item, row, tile);
  }
  for (int64_t row = entries.size(); row < rows; ++row) {
    memset(tile.queries + row * stride, 0, stride * sizeof(float));
    memset(tile.grads + row * stride, 0, stride * sizeof(float));
    tile.lse[row] = tile.lse_rest[row] = tile.product[row] = 0.0f;
  }
}

// Calls body(block, its first row, column) for the panels of a tile of keys, all blocks of entries
// for each, so that a panel is read while it is in the cache.
template <class Body>
inline void for_scores(const Span& keys, const Tile& tile, const Body& body) {
  for (int64_t column = 0; column < keys.size(); column += kPanel) {
    for (int64_t block = 0; block < tile.blocks(); ++block) body(block, block * kBlock, column);
  }
}

void find_weights(const Task& task, const Span& keys, const Tile& tile) {
  const int64_t size = task.item.a.size, stride = task.sizes.stride;
  for_scores(keys, tile, [&](int64_t block, int64_t row, int64_t column) {
    float* to = task.weights + row * kScores + column;
    if (column >= tile.seen[block]) {
      for (int64_t r = 0; r < kBlock; ++r) {
        memset(to + r * kScores, 0, kPanel * sizeof(float));
        memset(task.of_scores + (row + r) * kScores + column, 0, kPanel * sizeof(float));
      }
      return;
    }
    const float *lse = tile.lse + row, *rest = tile.lse_rest + row;
    const float exponents = task.item.exponents();
    const auto begin = [](int, int) __attribute__((always_inline)) { return Vec{}; };
    const auto end = [=](int r, int v, Vec score) __attribute__((always_inline)) {
      const Vec weight = exp2_negative((score - lse[r] - rest[r]) * exponents);
      store(to + r * kScores + v * kWidth, weight);
    };
    multiply<kBlock, kVectors, false>(tile.queries + row * stride, stride,
                              task.packed.keys + (keys.begin + column) * size, kPanel, size, begin,
                              end, NothingAhead());
  });
}

// Gradients of the scores: weight * (grad . value - grad . out).
void find_of_scores(const Task& task, const Span& keys, const Tile& tile) {
  const int64_t size = task.item.a.size, stride = task.sizes.stride;
  for_scores(keys, tile, [&](int64_t block, int64_t row, int64_t column) {
    if (column >= tile.seen[block]) return;
    const float* weights = task.weights + row * kScores + column;
    float* to = task.of_scores + row * kScores + column;
    const float* product = tile.product + row;
    const auto begin = [](int, int) __attribute__((always_inline)) { return Vec{}; };
    const auto end = [=](int r, int v, Vec of_weight) __attribute__((always_inline)) {
      const Vec weight = load(weights + r * kScores + v * kWidth);
      store(to + r * kScores + v * kWidth, weight * (of_weight - product[r]));
    };
    multiply<kBlock, kVectors, false>(tile.grads + row * stride, stride,
                              task.packed.values + (keys.begin + column) * size, kPanel, size,
                              begin, end, NothingAhead());
  });
}

// to += weights^T * right, for the entries that see each block of keys.
void add_to_keys(const Task& task, const Span& keys, const Tile& tile, const float* weights,
                 const float* right, float* to) {
  const int64_t stride = task.sizes.stride;
  for_panels(task.item.a.size, [&](int64_t column, auto count) {
    for (int64_t key = keys.begin; key < keys.end; key += kBlock) {
      const int64_t row = larger<int64_t>(task.item.first_entry(key) - tile.entries.begin, 0);
      if (row >= tile.entries.size()) break;
      accumulate<decltype(count)::value, true>(
          weights + row * kScores + key - keys.begin, kScores, right + row * stride + column,
          stride, tile.entries.size() - row, nullptr, to + (key - keys.begin) * stride + column);
    }
  });
}

void add_to_queries(const Task& task, const Span& keys, const Tile& tile) {
  const int64_t stride = task.sizes.stride;
  for_panels(task.item.a.size, [&](int64_t column, auto count) {
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      const int64_t row = block * kBlock;
      accumulate<decltype(count)::value, false>(
          task.of_scores + row * kScores, kScores,
          task.packed.key_rows + keys.begin * stride + column, stride, tile.seen[block], nullptr,
          tile.of_queries + row * stride + column);
    }
  });
}

void add_tile(const Task& task, const Span& keys, const Wanted& wanted, const Sums& sums,
              Tile& tile) {
  const Item& item = task.item;
  const Seen seen = visible(item, tile.entries, keys, kKeys);
  if (seen == kNone) return;
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    const int64_t next = smaller(tile.entries.begin + block * kBlock + kBlock, tile.entries.end);
    tile.seen[block] = smaller(larger<int64_t>(item.limit(next - 1) - keys.begin, 0), keys.size());
  }
  find_weights(task, keys, tile);
  for (int64_t row = 0; row < tile.entries.size() && seen == kSome; ++row) {
    const int64_t columns = round_up(tile.seen[row / kBlock], kPanel);
    hide(item, tile.entries.begin + row, keys, columns, 0.0f, task.weights + row * kScores);
  }
  find_of_scores(task, keys, tile);
  if (wanted.queries) add_to_queries(task, keys, tile);
  if (!wanted.keys) return;
  const int64_t offset = (keys.begin - sums.first) * task.sizes.stride;
  add_to_keys(task, keys, tile, task.weights, tile.grads, sums.values + offset);
  add_to_keys(task, keys, tile, task.of_scores, tile.queries, sums.keys + offset);
}

template <class T>
void write_queries(const Task& task, const Tile& tile) {
  for (int64_t row = 0; row < tile.entries.size(); ++row) {
    unpack_row(tile.of_queries + row * task.sizes.stride, task.item.a.size, task.item.a.scale,
               static_cast<T*>(task.a.grad_q) + task.item.query_offset(tile.entries.begin + row));
  }
}

template <class T>
void write_keys(const Item& item, const Backward& a, const Sizes& sizes, const Span& keys,
                const Sums& sums) {
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    const int64_t row = (key - sums.first) * sizes.stride, offset = item.key_offset(key);
    unpack_row(sums.keys + row, item.a.size, item.a.scale, static_cast<T*>(a.grad_k) + offset);
    unpack_row(sums.values + row, item.a.size, 1.0f, static_cast<T*>(a.grad_v) + offset);
  }
}

Sums make_sums(const Sizes& sizes, const Span& keys) {
  const int64_t numbers = round_up(keys.size(), kBlock) * sizes.stride;
  float* memory = static_cast<float*>(scratch(2, 2 * numbers * sizeof(float)));
  memset(memory, 0, 2 * numbers * sizeof(float));
  return {memory, memory + numbers, keys.begin};
}

// Takes entries through keys.
template <class T>
void go_through(Task& task, const Span& entries, const Span& keys, const Wanted& wanted,
                const Sums& sums) {
  const Item& item = task.item;
  for (int64_t start = entries.begin; start < entries.end; start += kTogether * kQueries) {
    task.count = 0;
    for (int64_t i = start; i < entries.end && task.count < kTogether; i += kQueries) {
      load_entries<T>(task, {i, smaller(i + kQueries, entries.end)}, task.tiles[task.count++]);
    }
    const int64_t last = task.tiles[task.count - 1].entries.end - 1;
    const int64_t end = smaller(item.limit(last), keys.end);
    for (int64_t key = keys.begin; key < end; key += kKeys) {
      const Span some{key, smaller(key + kKeys, keys.end)};
      for (int64_t i = 0; i < task.count; ++i) add_tile(task, some, wanted, sums, task.tiles[i]);
    }
    for (int64_t i = 0; i < task.count && wanted.queries; ++i) {
      write_queries<T>(task, task.tiles[i]);
    }
  }
}

// Gradients of the keys and values of a tile, or of all, from all entries; those of the queries too
// where wanted.
template <class T>
void go_back_to_keys(Task& task, const Span& keys, const Wanted& wanted) {
  const Item& item = task.item;
  const Sums sums = make_sums(task.sizes, keys);
  const int64_t first = wanted.queries ? 0 : item.first_entry(keys.begin) / kQueries * kQueries;
  go_through<T>(task, {first, item.entries()}, keys, wanted, sums);
  write_keys<T>(item, task.a, task.sizes, keys, sums);
}

// One wave of items. A thread computes all gradients of an item, or, where that would leave threads
// idle, those of a tile of queries or of keys: seven products instead of five.
template <class T>
void backward_wave(const Backward& b, const Sizes& sizes, int64_t start, int64_t here, bool split) {
  const Forward& a = b.forward;
  const int64_t work = a.queries * a.keys * a.heads * a.size;
  float* memory = static_cast<float*>(scratch(0, here * sizes.numbers * sizeof(float)));
  on_threads(work, [&](int thread, int threads) {
    const Range range = share(here * sizes.panels, 1, thread, threads);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t index = i / sizes.panels;
      pack<T>(item(a, start + index), sizes, sizes.at(a, memory, index), i % sizes.panels);
    }
  });
  const int64_t key_tiles = split ? (a.keys + kKeys - 1) / kKeys : 1;
  const int64_t query_tiles = (a.queries * (a.heads / a.groups) + kQueries - 1) / kQueries;
  const int64_t tiles = key_tiles + (split ? query_tiles : 0);
  int64_t counter = 0;
  on_threads(work, [&](int, int) {
    for (int64_t i = next(&counter); i < here * tiles; i = next(&counter)) {
      const Item one = item(a, start + i / tiles);
      const Packed packed = sizes.at(a, memory, i / tiles);
      const int64_t tile = i % tiles;
      Task task(one, b, sizes, packed);
      if (tile < key_tiles) {
        const Span keys = split ? span(tile, kKeys, a.keys) : Span{0, a.keys};
        go_back_to_keys<T>(task, keys, {!split, true});
      } else {
        // The longest first, so that threads end together.
        const Span entries = span(tiles - 1 - tile, kQueries, one.entries());
        go_through<T>(task, entries, {0, a.keys}, {true, false}, {});
      }
    }
  });
}

template <class T>
void backward(const Backward& b) {
  const int64_t count = items(b.forward), threads = omp_get_max_threads();
  const int64_t rounds = (count + threads - 1) / threads;
  const Sizes sizes(b.forward);
  const int64_t each = wave(count, sizes.numbers);
  for (int64_t start = 0; start < count; start += each) {
    const int64_t here = smaller(each, count - start);
    backward_wave<T>(b, sizes, start, here, 5 * rounds * threads > 7 * count);
  }
}

}  // namespace

void flash_attention_backward(const llama_ops_flash_attention_backward_args& a) {
  const Forward& f = a.forward;
  if (f.batch * f.queries * f.heads == 0) {
    const int64_t bytes = f.batch * f.keys * f.groups * f.size * (f.dtype == LLAMA_OPS_F32 ? 4 : 2);
    memset(a.grad_k, 0, bytes);
    memset(a.grad_v, 0, bytes);
    return;
  }
  f.dtype == LLAMA_OPS_F32 ? backward<float>(a) : backward<bf16>(a);
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
