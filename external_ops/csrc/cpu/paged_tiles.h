// Tiles of csrc/cpu/paged_attention.cc: some tokens of one sequence, and what they see.
#pragma once

#include "cpu/products.h"
#include "cpu/simd.h"
#include "llama_ops/paged_attention.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {
namespace paged {

constexpr int64_t kTileRows = 256;                    // most rows of a tile
constexpr int64_t kPanel = kProductVecs * kWidth;     // rows whose scores are computed together
constexpr int kFew = kWidth < 8 ? kWidth : 8;         // rows that make do without products
constexpr int64_t kFewKeys = 128, kManyKeys = 128;    // keys of a chunk
constexpr int64_t kBatch = 16;                        // keys that all heads take before the next
constexpr int64_t kAhead = kBatch;                    // keys between a prefetch and its use
static_assert(kAhead >= kWidth, "keys are asked for before they are used");
static_assert(kFewKeys == kManyKeys, "chunks do not depend on the number of rows");
constexpr float kHidden = -1e30f;

inline int64_t padded(int64_t size) { return (size + kWidth - 1) / kWidth * kWidth; }

struct Tile {
  int64_t first, tokens;      // packed tokens
  int64_t rows, padded_rows;  // tokens times the heads that share a key head
  int64_t keys;               // positions that the last token sees
  int64_t chunk, chunks;      // keys of a chunk, and how many chunks there are
};

inline Tile tile_of(int64_t first, int64_t tokens, int64_t shared, int64_t keys) {
  Tile tile{first, tokens, tokens * shared, 0, keys, kManyKeys, 0};
  if (tile.rows <= kFew) {
    tile.padded_rows = tile.rows <= 2 ? tile.rows : tile.rows <= 4 ? 4 : 8;
    tile.chunk = kFewKeys;
  } else {
    tile.padded_rows = padded(tile.rows);
  }
  tile.chunks = (keys + tile.chunk - 1) / tile.chunk;
  return tile;
}

// A softmax over some keys: weighted values, largest score and sum of exponentials of each row.
struct Result {
  float* out;    // [rows, padded dim]
  float* most;   // [rows], padded to vectors
  float* total;  // [rows], padded to vectors
};

inline int64_t result_size(const llama_ops_paged_attention_args& a, const Tile& tile) {
  return padded(padded(tile.rows) * (padded(a.dim) + 2));
}

// Results of several key heads, or chunks, side by side.
struct Results {
  float* memory;
  int64_t size, rows, dim;

  Results(const llama_ops_paged_attention_args& a, const Tile& tile, float* at)
      : memory(at), size(result_size(a, tile)), rows(padded(tile.rows)), dim(padded(a.dim)) {}

  Result operator[](int64_t i) const {
    float* out = memory + i * size;
    return {out, out + rows * dim, out + rows * dim + rows};
  }
};

// Rows before this one see nothing of a chunk and are left out of its result.
inline int64_t first_row(const llama_ops_paged_attention_args& a, const Tile& tile, int64_t chunk) {
  if (tile.rows <= kFew) return 0;
  const int64_t shared = a.heads / a.groups, start = chunk * tile.chunk;
  int64_t row = 0;
  while (row + kPanel < tile.rows &&
         a.position[tile.first + (row + kPanel - 1) / shared] < start) {
    row += kPanel;
  }
  return row;
}

inline void start(const llama_ops_paged_attention_args& a, const Tile& tile, const Result& total) {
  memset(total.out, 0, tile.rows * padded(a.dim) * sizeof(float));
  for (int64_t row = 0; row < tile.rows; row += kWidth) {
    store(total.most + row, splat(kHidden));
    store(total.total + row, Vec{});
  }
}

// Adds the result for a chunk to that for the chunks before.
__attribute__((noinline)) inline void merge(const llama_ops_paged_attention_args& a,
                                            const Tile& tile, int64_t chunk, const Result& part,
                                            const Result& total) {
  const int64_t dim = padded(a.dim), shared = a.heads / a.groups, begin = chunk * tile.chunk;
  const bool all = a.position[tile.first] >= begin;
  for (int64_t first = first_row(a, tile, chunk); first < tile.rows; first += kWidth) {
    const Vec before = load(total.most + first), now = load(part.most + first);
    const Vec most = maximum(before, now);
    const Vec keep = exp(before - most), take = exp(now - most);
    store(total.most + first, most);
    store(total.total + first, load(total.total + first) * keep + load(part.total + first) * take);
    float keeps[kWidth], takes[kWidth];
    store(keeps, keep);
    store(takes, take);
    const int64_t count = smaller<int64_t>(kWidth, tile.rows - first);
    for (int64_t i = 0; i < count; ++i) {
      if (!all && a.position[tile.first + (first + i) / shared] < begin) continue;
      float* out = total.out + (first + i) * dim;
      const float* more = part.out + (first + i) * dim;
      for (int64_t d = 0; d < dim; d += kWidth) {
        store(out + d, load(out + d) * keeps[i] + load(more + d) * takes[i]);
      }
    }
  }
}

// Writes the tile's part of the output.
inline void finish(const llama_ops_paged_attention_args& a, const Tile& tile, int64_t group,
                   const Result& total) {
  const int64_t dim = padded(a.dim), shared = a.heads / a.groups;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t token = tile.first + row / shared, head = group * shared + row % shared;
    float* out = a.out + (token * a.heads + head) * a.dim;
    const float scale = 1.0f / total.total[row];
    const float* from = total.out + row * dim;
    int64_t d = 0;
    for (; d + kWidth <= a.dim; d += kWidth) store(out + d, load(from + d) * scale);
    if (d < a.dim) store_some(out + d, load(from + d) * scale, a.dim - d);
  }
}

}  // namespace paged
}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
