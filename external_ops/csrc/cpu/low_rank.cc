// Low-rank products of several adapters; see llama_ops/low_rank.h and cpu/low_rank.h.
//
// A tile of an adapter's rows shares each load of its matrices. Every sum has an accumulator of its own,
// which runs over inputs or ranks from the first to the last, so that its bits do not depend on the
// tile that it is in.
#include "cpu/low_rank.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

typedef llama_ops_low_rank_args Args;
typedef llama_ops_low_rank_piece Piece;

constexpr int kWorkspace = 0;  // scratch of `low_rank`
// Of a tile: rows, and the ranks or vectors of outputs beside them. Their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif
constexpr int kBeside = 4;
constexpr int64_t kColumns = 16 * kBeside * kWidth;  // outputs that a thread takes at a time

int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Numbers of a piece in the workspace; whole lines of the cache, as threads write them.
int64_t inner_numbers(const Piece& p) { return tiles(p.num_rows * p.rank, 16) * 16; }

// A tile of rows of a piece.
struct Tile {
  const Piece& p;
  int64_t begin;
  int count;
  float* inner;  // of the piece: [num_rows, rank]

  const float* x(const Args& a, int r) const { return a.x + p.rows[begin + r] * a.inputs; }
  float* out(const Args& a, int r) const { return a.out + p.rows[begin + r] * a.width + p.first; }
  float* inner_of(int r) const { return inner + (begin + r) * p.rank; }
};

// Calls `run(tile, item)` for this thread's share of all pieces' tiles of rows times `beside(piece)`.
template <class Beside, class Run>
void for_tiles(const Args& a, int thread, int threads, const Beside& beside, const Run& run) {
  int64_t total = 0;
  for (int64_t i = 0; i < a.of.count; ++i) {
    total += tiles(a.of.pieces[i].num_rows, kRows) * beside(a.of.pieces[i]);
  }
  const Range mine = share(total, 1, thread, threads);
  float* inner = static_cast<float*>(a.workspace);
  int64_t before = 0;
  for (int64_t i = 0; i < a.of.count; ++i) {
    const Piece& p = a.of.pieces[i];
    const int64_t items = beside(p), count = tiles(p.num_rows, kRows) * items;
    const int64_t end = smaller(mine.end - before, count);
    // Tiles of rows follow one another at one place of the matrices, which stays in the cache.
    const int64_t deep = tiles(p.num_rows, kRows);
    for (int64_t n = larger<int64_t>(mine.begin - before, 0); n < end; ++n) {
      const int64_t begin = n % deep * kRows;
      const int rows = static_cast<int>(smaller<int64_t>(kRows, p.num_rows - begin));
      run(Tile{p, begin, rows, inner}, n / deep);
    }
    before += count;
    inner += inner_numbers(p);
  }
}

// Inner products of R rows with C rows of `a`, from rank `first` on.
template <int R, int C, class T>
void inner_sums(const Args& args, const Tile& tile, int64_t first) {
  const int64_t size = args.inputs;
  const T* a = static_cast<const T*>(tile.p.a) + first * size;
  Vec total[R][C] = {};
  const float* x[R];
  for (int r = 0; r < R; ++r) x[r] = tile.x(args, r);
  const auto add = [&](const Vec (&from)[R], const Vec (&weight)[C]) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) total[r][c] += from[r] * weight[c];
    }
  };
  int64_t i = 0;
  Vec from[R], weight[C];
  for (; i + kWidth <= size; i += kWidth) {
    for (int r = 0; r < R; ++r) from[r] = load(x[r] + i);
    for (int c = 0; c < C; ++c) weight[c] = load(a + c * size + i);
    add(from, weight);
  }
  if (i < size) {
    for (int r = 0; r < R; ++r) from[r] = load_some(x[r] + i, size - i);
    for (int c = 0; c < C; ++c) weight[c] = load_some(a + c * size + i, size - i);
    add(from, weight);
  }
  for (int r = 0; r < R; ++r) {
    float* to = tile.inner_of(r) + first;
    for (int c = 0; c < C; ++c) to[c] = sum(total[r][c]) * tile.p.scale;
  }
}

template <int R, class T>
void inner_tile(const Args& args, const Tile& tile, int64_t item) {
  const int64_t first = item * kBeside, end = smaller(first + kBeside, tile.p.rank);
  if (end - first == kBeside) return inner_sums<R, kBeside, T>(args, tile, first);
  for (int64_t rank = first; rank < end; ++rank) inner_sums<R, 1, T>(args, tile, rank);
}

// Adds to V vectors of outputs of R rows, or to `left` numbers where that is fewer than a vector.
template <int R, int V, class T>
void outer_sums(const Args& args, const Tile& tile, int64_t column, int64_t left) {
  const int64_t stride = tile.p.outputs;
  const T* b = static_cast<const T*>(tile.p.b) + column;
  Vec total[R][V] = {};
  const float* inner[R];
  for (int r = 0; r < R; ++r) inner[r] = tile.inner_of(r);
  for (int64_t k = 0; k < tile.p.rank; ++k, b += stride) {
    Vec weight[V];
    for (int v = 0; v < V; ++v) {
      weight[v] = left < kWidth ? load_some(b, left) : load(b + v * kWidth);
    }
    for (int r = 0; r < R; ++r) {
      const Vec by = splat(inner[r][k]);
      for (int v = 0; v < V; ++v) total[r][v] += by * weight[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    float* out = tile.out(args, r) + column;
    if (left < kWidth) {
      store_some(out, load_some(out, left) + total[r][0], left);
      continue;
    }
    for (int v = 0; v < V; ++v) store(out + v * kWidth, load(out + v * kWidth) + total[r][v]);
  }
}

template <int R, class T>
void outer_tile(const Args& args, const Tile& tile, int64_t item) {
  int64_t column = item * kColumns;
  const int64_t end = smaller(column + kColumns, tile.p.outputs);
  for (; column + kBeside * kWidth <= end; column += kBeside * kWidth) {
    outer_sums<R, kBeside, T>(args, tile, column, kBeside * kWidth);
  }
  for (; column < end; column += kWidth) outer_sums<R, 1, T>(args, tile, column, end - column);
}

template <class T>
void inner_any(const Args& args, const Tile& tile, int64_t item) {
  switch (tile.count) {
    case 1: return inner_tile<1, T>(args, tile, item);
    case 2: return inner_tile<2, T>(args, tile, item);
#if defined(__AVX512F__)
    case 3: return inner_tile<3, T>(args, tile, item);
    default: return inner_tile<4, T>(args, tile, item);
#endif
  }
}

template <class T>
void outer_any(const Args& args, const Tile& tile, int64_t item) {
  switch (tile.count) {
    case 1: return outer_tile<1, T>(args, tile, item);
    case 2: return outer_tile<2, T>(args, tile, item);
#if defined(__AVX512F__)
    case 3: return outer_tile<3, T>(args, tile, item);
    default: return outer_tile<4, T>(args, tile, item);
#endif
  }
}

}  // namespace

int64_t low_rank_workspace(const llama_ops_low_rank_pieces& of) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < of.count; ++i) numbers += inner_numbers(of.pieces[i]);
  return numbers * 4;
}

double low_rank_work(const llama_ops_low_rank_pieces& of, int64_t inputs) {
  double products = 0;
  for (int64_t i = 0; i < of.count; ++i) {
    const Piece& p = of.pieces[i];
    products += static_cast<double>(p.num_rows * p.rank) * static_cast<double>(inputs + p.outputs);
  }
  return products / kWidth;
}

void low_rank_inner_part(const Args& a, int thread, int threads) {
  const auto beside = [](const Piece& p) { return tiles(p.rank, kBeside); };
  for_tiles(a, thread, threads, beside, [&](const Tile& tile, int64_t item) {
    tile.p.dtype == LLAMA_OPS_F32 ? inner_any<float>(a, tile, item)
                                  : inner_any<bf16>(a, tile, item);
  });
}

void low_rank_outer_part(const Args& a, int thread, int threads) {
  const auto beside = [](const Piece& p) { return tiles(p.outputs, kColumns); };
  for_tiles(a, thread, threads, beside, [&](const Tile& tile, int64_t item) {
    tile.p.dtype == LLAMA_OPS_F32 ? outer_any<float>(a, tile, item)
                                  : outer_any<bf16>(a, tile, item);
  });
}

void low_rank(const Args& given) {
  Args a = given;
  if (a.of.count == 0) return;
  a.workspace = scratch(kWorkspace, low_rank_workspace(a.of));
  on_threads(low_rank_work(a.of, a.inputs), [&](int thread, int threads) {
    low_rank_inner_part(a, thread, threads);
    if (threads > 1) {
#pragma omp barrier
    }
    low_rank_outer_part(a, thread, threads);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
