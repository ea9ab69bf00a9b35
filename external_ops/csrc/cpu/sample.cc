// Drawing tokens; see llama_ops/sample.h.
//
// What stays of a row is what lies before a place in the order of its keys, (top - score) /
// temperature, and of equal keys before a place in the row. The place is found without sorting the
// row: weights are added by the keys' leading bits, and only those keys are sorted that share them
// with the place.
#include "llama_ops/sample.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

constexpr int64_t kPiece = 512;  // weights that are added in float32; their sums are in float64
constexpr int kShift = 16;       // 128 steps from a power of two to the next
constexpr int64_t kBins = (0x7f800000 >> kShift) + 1;
enum Slot { kKeys = 0, kWeights = 1, kPieces = 2, kBinSums = 3, kInside = 4 };

struct Place {
  float key;
  int64_t index;
};

inline bool before(Place a, Place b) { return a.key < b.key || (a.key == b.key && a.index < b.index); }

// Keys of a float that is not negative rise as its bits do.
inline int64_t bin_of(float key) {
  uint32_t bits;
  memcpy(&bits, &key, 4);
  return bits >> kShift;
}
inline float first_of(int64_t bin) {
  const uint32_t bits = static_cast<uint32_t>(bin) << kShift;
  float key;
  memcpy(&key, &bits, 4);
  return key;
}

inline bool any(IntVec x) {
  int64_t pairs[kWidth / 2];
  memcpy(pairs, &x, sizeof x);
  int64_t found = 0;
  for (int64_t one : pairs) found |= one;
  return found != 0;
}

// x - x is 0 but for NaN and infinity, where it is NaN, and NaN stays in a sum.
bool finite(const float* x, int64_t size) {
  Vec found[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= size; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) {
      const Vec one = load(x + i + c * kWidth);
      found[c] += one - one;
    }
  }
  float rest = sum((found[0] + found[1]) + (found[2] + found[3]));
  for (; i < size; ++i) rest += x[i] - x[i];
  return rest == 0.0f;
}

double piece_sum(const float* weights, int64_t size) {
  Vec found[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kWidth <= size; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) found[c] += load(weights + i + c * kWidth);
  }
  double total = sum((found[0] + found[1]) + (found[2] + found[3]));
  for (; i < size; ++i) total += weights[i];
  return total;
}

double log_sum(const float* x, int64_t size, float top) {
  double total = 0.0;
  for (int64_t start = 0; start < size; start += kPiece) {
    const int64_t end = smaller(start + kPiece, size);
    Vec found[2] = {};
    int64_t i = start;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      found[0] += exp(load(x + i) - top);
      found[1] += exp(load(x + i + kWidth) - top);
    }
    double piece = sum(found[0] + found[1]);
    for (; i < end; i += kWidth) {
      const int64_t left = smaller<int64_t>(kWidth, end - i);
      float rest[kWidth];
      store(rest, exp(load_some(x + i, left) - top));
      for (int64_t j = 0; j < left; ++j) piece += rest[j];
    }
    total += piece;
  }
  return top + log(total);
}

// The scratch of one row.
struct Row {
  float* keys;
  float* weights;
  double* pieces;
  double* bins;
  Place* inside;
  int64_t width;
  Place last;  // of those that stay

  bool stays(int64_t i) const { return !before(last, Place{keys[i], i}); }
  bool all() const { return last.key == INFINITY; }
};

Row row_of(int64_t width) {
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  Row row;
  row.keys = static_cast<float*>(scratch(kKeys, width * sizeof(float)));
  row.weights = static_cast<float*>(scratch(kWeights, width * sizeof(float)));
  row.pieces = static_cast<double*>(scratch(kPieces, pieces * sizeof(double)));
  row.bins = static_cast<double*>(scratch(kBinSums, kBins * sizeof(double)));
  row.inside = static_cast<Place*>(scratch(kInside, width * sizeof(Place)));
  row.width = width;
  row.last = Place{INFINITY, width};
  return row;
}

void fill(const Row& row, const float* scores, float top, float temperature) {
  int64_t i = 0;
  for (; i + kWidth <= row.width; i += kWidth) {
    const Vec key = (top - load(scores + i)) / temperature;
    store(row.keys + i, key);
    store(row.weights + i, exp(-key));
  }
  const int64_t left = row.width - i;
  const Vec key = (top - load_some(scores + i, left)) / temperature;
  store_some(row.keys + i, key, left);
  store_some(row.weights + i, exp(-key), left);
}

// Puts places in order: a heap whose root is the last one.
void sort(Place* x, int64_t size) {
  auto sink = [x](int64_t root, int64_t end) {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && before(x[child], x[child + 1])) ++child;
      if (!before(x[root], x[child])) return;
      const Place held = x[root];
      x[root] = x[child];
      x[child] = held;
    }
  };
  for (int64_t root = size / 2 - 1; root >= 0; --root) sink(root, size);
  for (int64_t end = size - 1; end > 0; --end) {
    const Place held = x[0];
    x[0] = x[end];
    x[end] = held;
    sink(0, end);
  }
}

// Keeps the fewest of those that stay, in their order, whose weights (1 each where `counts`) reach
// `wanted`.
void keep_fewest(Row& row, double wanted, bool counts) {
  for (int64_t bin = 0; bin < kBins; ++bin) row.bins[bin] = 0.0;
  for (int64_t i = 0; i < row.width; ++i) {
    if (row.all() || row.stays(i)) row.bins[bin_of(row.keys[i])] += counts ? 1.0 : row.weights[i];
  }
  double total = 0.0;
  int64_t edge = 0;
  while (edge < kBins - 1 && total + row.bins[edge] < wanted) total += row.bins[edge++];
  int64_t count = 0;
  const float low = first_of(edge), high = first_of(edge + 1);  // beyond infinity: NaN, none is below
  for (int64_t start = 0; start < row.width; start += kWidth) {
    const int64_t end = smaller<int64_t>(start + kWidth, row.width);
    if (end - start == kWidth && edge < kBins - 1) {
      const Vec key = load(row.keys + start);
      if (!any((key >= low) & (key < high))) continue;
    }
    for (int64_t i = start; i < end; ++i) {
      if (bin_of(row.keys[i]) == edge && row.stays(i)) row.inside[count++] = Place{row.keys[i], i};
    }
  }
  if (count == 0) return;  // rounding: all of them do not reach it
  sort(row.inside, count);
  int64_t chosen = 0;
  while (true) {
    const int64_t index = row.inside[chosen].index;
    total += counts ? 1.0 : row.weights[index];
    if (total >= wanted || chosen == count - 1) break;
    ++chosen;
  }
  row.last = row.inside[chosen];
  if (counts) row.last.index = row.width;  // all that are as likely as the last one
}

// Sets the weights of those that do not stay to zero.
void drop(const Row& row, int64_t start, int64_t end) {
  int64_t i = start;
  // Of keys like the last one, all stay that lie before its place, and none behind it.
  const bool equal = row.last.index >= end;
  if (equal || row.last.index < start) {
    for (; i + kWidth <= end; i += kWidth) {
      const Vec key = load(row.keys + i), weight = load(row.weights + i);
      store(row.weights + i, (equal ? key <= row.last.key : key < row.last.key) ? weight : Vec{});
    }
  }
  for (; i < end; ++i) row.weights[i] = row.stays(i) ? row.weights[i] : 0.0f;
}

double add_pieces(const Row& row) {
  double total = 0.0;
  for (int64_t start = 0, piece = 0; start < row.width; start += kPiece, ++piece) {
    const int64_t end = smaller(start + kPiece, row.width);
    if (!row.all()) drop(row, start, end);
    row.pieces[piece] = piece_sum(row.weights + start, end - start);
    total += row.pieces[piece];
  }
  return total;
}

// The weight that covers `place` of their sum.
int64_t find(const Row& row, double place, double total) {
  double wanted = place * total;
  const int64_t pieces = (row.width + kPiece - 1) / kPiece;
  int64_t piece = 0;
  while (piece < pieces - 1 && wanted >= row.pieces[piece]) wanted -= row.pieces[piece++];
  const int64_t start = piece * kPiece, end = smaller(start + kPiece, row.width);
  int64_t i = start;
  while (i < end - 1 && wanted >= row.weights[i]) wanted -= row.weights[i++];
  // Rounding may lead onto a weight that is zero; the nearest one that is not, first to the left.
  int64_t left = i;
  while (left >= 0 && row.weights[left] == 0.0f) --left;
  if (left >= 0) return left;
  while (i < row.width - 1 && row.weights[i] == 0.0f) ++i;
  return i;
}

int64_t draw(const float* scores, int64_t width, float top, const llama_ops_sample_settings& s) {
  if (s.temperature == 0.0) {
    int64_t i = 0;
    while (scores[i] != top) ++i;
    return i;
  }
  Row row = row_of(width);
  fill(row, scores, top, static_cast<float>(s.temperature > 1e-30 ? s.temperature : 1e-30));
  if (s.top_k > 0 && s.top_k < width) keep_fewest(row, s.top_k, true);
  if (s.top_p < 1) keep_fewest(row, s.top_p * add_pieces(row), false);
  if (s.min_p > 0) {
    const Place furthest{static_cast<float>(-log(s.min_p)), width};
    if (before(furthest, row.last)) row.last = furthest;
  }
  return find(row, s.place, add_pieces(row));
}

void one_row(const llama_ops_sample_args& a, int64_t row) {
  const float* logits = a.logits + row * a.width;
  a.logprobs[row] = 0.0;
  if (!finite(logits, a.width)) {
    a.tokens[row] = LLAMA_OPS_SAMPLE_BROKEN;
    return;
  }
  const float* scores = a.edit[row] < 0 ? logits : a.edited + a.edit[row] * a.width;
  const float top = row_top(scores, a.width);
  if (top == -INFINITY) {
    a.tokens[row] = LLAMA_OPS_SAMPLE_RULED_OUT;
    return;
  }
  const int64_t token = draw(scores, a.width, top, a.settings[row]);
  const float own = scores == logits ? top : row_top(logits, a.width);
  a.tokens[row] = token;
  a.logprobs[row] = logits[token] - log_sum(logits, a.width, own);
}

}  // namespace

void sample(const llama_ops_sample_args& a) {
  on_threads(20 * a.rows * a.width, [&](int thread, int threads) {
    const Range rows = share(a.rows, 1, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) one_row(a, row);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
