// Attention forward; see llama_ops/flash_attention.h and cpu/flash_attention.h.
#include "cpu/flash_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

using namespace attention;

constexpr int kKeys = 384;  // of a tile; multiple of kBlock and of kPanel
constexpr int kScores = scores_stride(kKeys);

constexpr int kLanes = 16;          // room for whole vectors of numbers of a block's rows
constexpr float kUnseen = -1e30f;  // below every score, yet far enough from -infinity to subtract

// Where the operands of an item lie: panels of keys, and values row by row.
struct Packed {
  float *keys, *values;
};

struct Sizes {
  int64_t stride, panels, numbers;
  explicit Sizes(const Forward& a)
      : stride(row_stride(a.size)),
        panels((a.keys + kPanel - 1) / kPanel),
        numbers(panels * kPanel * (a.size + stride)) {}
  Packed at(float* memory, int64_t index) const {
    float* keys = memory + index * numbers;
    return {keys, keys + numbers - panels * kPanel * stride};
  }
};

template <class T>
void pack(const Item& item, const Sizes& sizes, const Packed& to, int64_t panel) {
  const Forward& a = item.a;
  const int64_t first = panel * kPanel, end = smaller(first + kPanel, a.keys);
  const T* v = static_cast<const T*>(a.v);
  pack_panel(item, static_cast<const T*>(a.k), first, to.keys + first * a.size);
  for (int64_t key = first; key < end; ++key) {
    if (key + kPanel < a.keys) prefetch_row(v + item.key_offset(key + kPanel), a.size);
    pack_row(v + item.key_offset(key), a.size, sizes.stride, 1.0f, to.values + key * sizes.stride);
  }
}

// A tile of entries on its way through the keys.
struct Tile {
  Span entries;
  float *queries, *out;               // [kQueries][stride]
  float *scores;                      // [kQueries][kScores]
  float peak[kQueries + kLanes], total[kQueries + kLanes], decay[kQueries + kLanes];
  int64_t seen[kQueries / kBlock];    // columns of the present tile of keys, by block
  int64_t blocks() const { return (entries.size() + kBlock - 1) / kBlock; }
};

// Brings what a tile needs later into the cache while its first scores are computed: the places of
// a block's results, and the queries of the tile that probably comes next, the one before.
template <class T>
void prefetch_block(const Item& item, const Span& entries, int64_t block) {
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t entry = entries.begin + block * kBlock + r, before = entry - kQueries;
    if (entry < entries.end) {
      prefetch_row(static_cast<const T*>(item.a.out) + item.query_offset(entry), item.a.size);
    }
    if (before >= 0) {
      prefetch_row(static_cast<const T*>(item.a.q) + item.query_offset(before), item.a.size);
    }
  }
}

template <class T>
void find_scores(const Item& item, const Sizes& sizes, const Packed& packed, const Span& keys,
                 Tile& tile) {
  for (int64_t first = keys.begin; first < keys.end; first += kPanel) {
    const float* panel = packed.keys + first * item.a.size;
    Ahead ahead;
    ahead.add(panel + kPanel * item.a.size, kPanel * item.a.size);
    ahead.add(packed.values + first * sizes.stride, kPanel * sizes.stride);
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      const int64_t column = first - keys.begin, row = block * kBlock;
      if (first == 0) prefetch_block<T>(item, tile.entries, block);
      if (column >= tile.seen[block]) continue;
      float* to = tile.scores + row * kScores + column;
      const auto begin = [](int, int) __attribute__((always_inline)) { return Vec{}; };
      const auto end = [=](int r, int v, Vec sum) __attribute__((always_inline)) {
        store(to + r * kScores + v * kWidth, sum);
      };
      multiply<kBlock, kVectors, false>(tile.queries + row * sizes.stride, sizes.stride, panel, kPanel,
                                item.a.size, begin, end, ahead.take(item.a.size, panel));
    }
  }
}

// Turns the scores of a block into weights relative to the highest score yet in each row.
void weigh(Tile& tile, int64_t row, int64_t columns, float exponents) {
  float* scores = tile.scores + row * kScores;
  Vec most[kBlock], sums[kBlock];
  for (int r = 0; r < kBlock; ++r) most[r] = splat(tile.peak[row + r]), sums[r] = Vec{};
  for (int64_t j = 0; j < columns; j += kWidth) {
#pragma GCC unroll 6
    for (int r = 0; r < kBlock; ++r) most[r] = maximum(most[r], load(scores + r * kScores + j));
  }
  alignas(64) float peaks[kLanes] = {}, totals[kLanes] = {};
  for (int r = 0; r < kBlock; ++r) peaks[r] = largest_lane(most[r]);
  for (int64_t j = 0; j < columns; j += kWidth) {
#pragma GCC unroll 6
    for (int r = 0; r < kBlock; ++r) {
      const Vec weight =
          exp2_negative((load(scores + r * kScores + j) - peaks[r]) * exponents);
      store(scores + r * kScores + j, weight);
      sums[r] += weight;
    }
  }
  for (int r = 0; r < kBlock; ++r) totals[r] = sum_lanes(sums[r]);
  for (int i = 0; i < kBlock; i += kWidth) {
    const Vec change = load(tile.peak + row + i) - load(peaks + i);
    const Vec decay = exp2_negative(change * exponents);
    store(tile.decay + row + i, decay);
    store(totals + i, load(tile.total + row + i) * decay + load(totals + i));
  }
  memcpy(tile.peak + row, peaks, kBlock * sizeof(float));
  memcpy(tile.total + row, totals, kBlock * sizeof(float));
}

template <class T>
void add_keys(const Item& item, const Sizes& sizes, const Packed& packed, const Span& keys,
              Seen seen, Tile& tile) {
  const Span& entries = tile.entries;
  for (int64_t block = 0; block < tile.blocks(); ++block) {
    const int64_t last = smaller(entries.begin + block * kBlock + kBlock, entries.end) - 1;
    tile.seen[block] = smaller(larger<int64_t>(item.limit(last) - keys.begin, 0), keys.size());
  }
  find_scores<T>(item, sizes, packed, keys, tile);
  for (int64_t row = 0; row < tile.blocks() * kBlock; row += kBlock) {
    const int64_t columns = round_up(tile.seen[row / kBlock], kWidth);
    for (int64_t r = row; r < row + kBlock && seen == kSome; ++r) {
      const int64_t entry = smaller(entries.begin + r, entries.end - 1);
      hide(item, entry, keys, columns, -INFINITY, tile.scores + r * kScores);
    }
    weigh(tile, row, columns, item.exponents());
  }
  for_panels(item.a.size, [&](int64_t column, auto count) {
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      const int64_t row = block * kBlock;
      accumulate<decltype(count)::value, false>(
          tile.scores + row * kScores, kScores, packed.values + keys.begin * sizes.stride + column,
          sizes.stride, tile.seen[block], tile.decay + row, tile.out + row * sizes.stride + column);
    }
  });
}

template <class T>
void finish(const Item& item, const Sizes& sizes, const Tile& tile) {
  for (int64_t row = 0; row < tile.entries.size(); ++row) {
    const int64_t entry = tile.entries.begin + row;
    const float total = tile.total[row], share = total > 0.0f ? 1.0f / total : 0.0f;
    unpack_row(tile.out + row * sizes.stride, item.a.size, share,
               static_cast<T*>(item.a.out) + item.query_offset(entry));
    const double peak = tile.peak[row] * static_cast<double>(item.a.scale);
    const double lse = peak + log(static_cast<double>(total));
    const int64_t offset = item.lse_offset(entry);
    item.a.lse[offset] = total > 0.0f ? static_cast<float>(lse) : -INFINITY;
    item.a.lse_rest[offset] = total > 0.0f ? static_cast<float>(lse - item.a.lse[offset]) : 0.0f;
  }
}

template <class T>
void attend(const Item& item, const Sizes& sizes, const Packed& packed, const Span& entries) {
  const Forward& a = item.a;
  const int64_t numbers = kQueries * (2 * sizes.stride + kScores);
  float* memory = static_cast<float*>(scratch(1, numbers * sizeof(float)));
  Tile tile;
  tile.entries = entries;
  tile.queries = memory;
  tile.out = memory + kQueries * sizes.stride;
  tile.scores = tile.out + kQueries * sizes.stride;
  memset(memory, 0, 2 * kQueries * sizes.stride * sizeof(float));
  for (int64_t row = 0; row < kQueries + kLanes; ++row) {
    tile.peak[row] = kUnseen;
    tile.total[row] = 0.0f;
  }
  const T* q = static_cast<const T*>(a.q);
  for (int64_t row = 0; row < entries.size(); ++row) {
    pack_row(q + item.query_offset(entries.begin + row), a.size, sizes.stride, 1.0f,
             tile.queries + row * sizes.stride);
  }
  const int64_t end = item.limit(entries.end - 1);
  for (int64_t first = 0; first < end; first += kKeys) {
    const Span keys{first, smaller(first + kKeys, a.keys)};
    const Seen seen = visible(item, entries, keys, kKeys);
    if (seen != kNone) add_keys<T>(item, sizes, packed, keys, seen, tile);
  }
  finish<T>(item, sizes, tile);
}

template <class T>
void forward(const Forward& a) {
  const Sizes sizes(a);
  const int64_t each = wave(items(a), sizes.numbers);
  const int64_t tiles = (a.queries * (a.heads / a.groups) + kQueries - 1) / kQueries;
  const int64_t work = a.queries * a.keys * a.heads * a.size;
  float* memory = static_cast<float*>(scratch(0, each * sizes.numbers * sizeof(float)));
  for (int64_t start = 0; start < items(a); start += each) {
    const int64_t here = smaller(each, items(a) - start);
    on_threads(work, [&](int thread, int threads) {
      const Range range = share(here * sizes.panels, 1, thread, threads);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t index = i % here;  // neighbours in memory one after the other
        pack<T>(item(a, start + index), sizes, sizes.at(memory, index), i / here);
      }
    });
    int64_t counter = 0;
    on_threads(work, [&](int, int) {
      for (int64_t i = next(&counter); i < here * tiles; i = next(&counter)) {
        const Item one = item(a, start + i / tiles);
        // The longest first, so that threads end together.
        const Span entries = span(tiles - 1 - i % tiles, kQueries, one.entries());
        attend<T>(one, sizes, sizes.at(memory, i / tiles), entries);
      }
    });
  }
}

}  // namespace

void flash_attention_forward(const llama_ops_flash_attention_forward_args& a) {
  if (a.batch * a.queries * a.heads == 0) return;
  a.dtype == LLAMA_OPS_F32 ? forward<float>(a) : forward<bf16>(a);
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
