// AdamW and sums of squares; see llama_ops/adamw.h.
#include "llama_ops/adamw.h"

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

// Numbers of a parameter that go to one thread in one piece; partial sums of squares are over these.
constexpr int64_t kPiece = 16384;

inline int64_t pieces_of(int64_t size) { return (size + kPiece - 1) / kPiece; }

Vec root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  float numbers[kWidth];
  store(numbers, x);
  for (float& one : numbers) one = sqrtf(one);
  return load(numbers);
#endif
}

// What all numbers of a parameter share. Corrections of the bias are drawn together into the rate
// and epsilon, which is algebra: rate m' / (sqrt(v') + e) = step m / (sqrt(v) + floor).
struct Update {
  float keep, beta1, beta2, step, floor, scale;
};

Update update_of(const llama_ops_adamw_args& a, const llama_ops_adamw_parameter& p) {
  const float correction = sqrtf(1.0f - p.beta2_power);
  return {1.0f - a.rate * p.decay, a.beta1, a.beta2, a.rate * correction / (1.0f - p.beta1_power),
          a.epsilon * correction, a.scale};
}

inline void update(const Update& u, Vec gradient, Vec& weight, Vec& moment1, Vec& moment2) {
  const Vec g = gradient * u.scale;
  moment1 = moment1 * u.beta1 + g * (1.0f - u.beta1);
  moment2 = moment2 * u.beta2 + g * g * (1.0f - u.beta2);
  weight = weight * u.keep - u.step * (moment1 / (root(moment2) + u.floor));
}

template <class T>
void update_piece(const Update& u, const llama_ops_adamw_parameter& p, int64_t begin, int64_t end) {
  const T* gradient = static_cast<const T*>(p.gradient);
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    Vec weight = load(p.weight + i), moment1 = load(p.moment1 + i), moment2 = load(p.moment2 + i);
    update(u, load(gradient + i), weight, moment1, moment2);
    store(p.weight + i, weight);
    store(p.moment1 + i, moment1);
    store(p.moment2 + i, moment2);
  }
  const int64_t left = end - i;
  if (left == 0) return;
  Vec weight = load_some(p.weight + i, left), moment1 = load_some(p.moment1 + i, left);
  Vec moment2 = load_some(p.moment2 + i, left);
  update(u, load_some(gradient + i, left), weight, moment1, moment2);
  store_some(p.weight + i, weight, left);
  store_some(p.moment1 + i, moment1, left);
  store_some(p.moment2 + i, moment2, left);
}

// Float64 throughout: the squares of a billion small numbers are lost beside their sum in float32.
template <class T>
double squares_of(const T* x, int64_t size) {
  double chains[8] = {};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int c = 0; c < 8; ++c) {
      const double one = widen(x[i + c]);
      chains[c] += one * one;
    }
  }
  for (; i < size; ++i) {
    const double one = widen(x[i]);
    chains[0] += one * one;
  }
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) +
         ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

template <class Use>
void for_pieces(int64_t count, const int64_t* sizes, int thread, int threads, const Use& use) {
  int64_t total = 0, first = 0;
  for (int64_t i = 0; i < count; ++i) total += pieces_of(sizes[i]);
  const Range mine = share(total, 1, thread, threads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t last = first + pieces_of(sizes[i]);
    const int64_t begin = larger(first, mine.begin), end = smaller(last, mine.end);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t from = (piece - first) * kPiece;
      use(i, piece, from, smaller(from + kPiece, sizes[i]));
    }
    first = last;
  }
}

}  // namespace

void adamw(const llama_ops_adamw_args& a) {
  int64_t* sizes = static_cast<int64_t*>(scratch(0, larger<int64_t>(a.count, 1) * sizeof(int64_t)));
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += sizes[i] = a.parameters[i].size;
  on_threads(total, [&](int thread, int threads) {
    for_pieces(a.count, sizes, thread, threads,
               [&](int64_t i, int64_t, int64_t begin, int64_t end) {
                 const llama_ops_adamw_parameter& p = a.parameters[i];
                 const Update u = update_of(a, p);
                 p.gradient_dtype == LLAMA_OPS_F32 ? update_piece<float>(u, p, begin, end)
                                                   : update_piece<bf16>(u, p, begin, end);
               });
  });
}

void squares(const llama_ops_squares_args& a) {
  int64_t total = 0, pieces = 0;
  for (int64_t i = 0; i < a.count; ++i) total += a.sizes[i], pieces += pieces_of(a.sizes[i]);
  double* partial = static_cast<double*>(scratch(0, larger<int64_t>(pieces, 1) * sizeof(double)));
  on_threads(total, [&](int thread, int threads) {
    for_pieces(a.count, a.sizes, thread, threads,
               [&](int64_t i, int64_t piece, int64_t begin, int64_t end) {
                 const int64_t size = end - begin;
                 partial[piece] =
                     a.dtypes[i] == LLAMA_OPS_F32
                         ? squares_of(static_cast<const float*>(a.arrays[i]) + begin, size)
                         : squares_of(static_cast<const bf16*>(a.arrays[i]) + begin, size);
               });
  });
  *a.total = 0.0;
  for (int64_t piece = 0; piece < pieces; ++piece) *a.total += partial[piece];
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
