// Decoder layers; see llama_ops/decoder.h. Each step of a layer is a part of another kernel, with a
// barrier wherever threads read what others wrote.
#include "llama_ops/decoder.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "cpu/linear.h"
#include "cpu/low_rank.h"
#include "cpu/paged_attention.h"
#include "cpu/parallel.h"
#include "cpu/rms_norm.h"
#include "cpu/simd.h"
#include "cpu/swiglu.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

namespace {

typedef llama_ops_decoder_args Args;
typedef llama_ops_decoder_layer Layer;

// Scratch of the calling thread for all, and of each thread for itself; parts use other slots.
constexpr int kShared = 2, kOwn = 3;
constexpr int64_t kMeetings = 10;  // barriers in a layer
constexpr double kBytes = 20;      // read in a nanosecond from the last cache, by one thread
constexpr int kSpins = 2000;  // some 0.1 ms, longer than threads usually are apart

// Lets no thread on before all have come: at one token a product takes less time than OpenMP's
// barrier where threads sleep in it (OMP_WAIT_POLICY=PASSIVE).
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int turn = __atomic_load_n(&turn_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&turn_, turn + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0) wake();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (__atomic_load_n(&turn_, __ATOMIC_ACQUIRE) != turn) return;
      pause();
    }
    // The thread that is missing has lost its core, perhaps to this one.
    __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&turn_, __ATOMIC_SEQ_CST) == turn) sleep(turn);
    __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

#if defined(__linux__)
  void sleep(int turn) { syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int) { sched_yield(); }
  void wake() {}
#endif

  alignas(64) int arrived_ = 0;
  alignas(64) int turn_ = 0;
  int sleepers_ = 0;
};

// What the threads of a call share.
struct Shared {
  Barrier barrier;
  float* cos;       // [tokens, dim / 2]
  float* sin;       // [tokens, dim / 2]
  float* normed;    // [tokens, hidden]
  float* qkv;       // [tokens, (heads + 2 groups) dim]
  float* attended;  // [tokens, heads dim]
  float* gate_up;   // [tokens, 2 ffn]
  float* inner;     // [tokens, ffn]
  char* prepared;   // inputs of a product
  char* low_rank;   // between the two products of adapters
  char* workspace;  // of attention, or null where it needs none
};

int64_t qkv_size(const Args& a) { return (a.heads + 2 * a.groups) * a.dim; }

llama_ops_paged_attention_args attention_args(const Args& a, const Layer& layer, const Shared& s) {
  llama_ops_paged_attention_args of{};
  of.q = s.qkv;
  of.k = of.q + a.heads * a.dim;
  of.v = of.k + a.groups * a.dim;
  of.cos = s.cos;
  of.sin = s.sin;
  of.k_cache = layer.k_cache;
  of.v_cache = layer.v_cache;
  of.block_table = a.block_table;
  of.sequence = a.sequence;
  of.position = a.position;
  of.out = s.attended;
  of.q_stride = of.k_stride = of.v_stride = qkv_size(a);
  of.tokens = a.tokens;
  of.heads = a.heads;
  of.groups = a.groups;
  of.dim = a.dim;
  of.block = a.block;
  of.table_width = a.table_width;
  of.cache_dtype = a.cache_dtype;
  return of;
}

// Which of a layer's linears; `low_rank` of a layer has them in this order.
enum Which { kQkv, kO, kGateUp, kDown };

int64_t inputs_of(const Layer& layer, int which) {
  const llama_ops_linear_weight* all[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
  return all[which]->inputs;
}

int64_t largest_low_rank(const Args& a) {
  int64_t most = 0;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    for (const llama_ops_low_rank_pieces& one : a.layers[i].low_rank) {
      most = larger(most, LLAMA_OPS_BASE::low_rank_workspace(one));
    }
  }
  return most;
}

int64_t largest_prepared(const Args& a) {
  int64_t most = 0;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    const Layer& layer = a.layers[i];
    const llama_ops_linear_weight* all[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    for (const llama_ops_linear_weight* one : all) {
      most = larger(most, linear_prepared_bytes(*one, a.tokens));
    }
  }
  return most;
}

// Cuts the shared buffers out of one piece of the calling thread's scratch memory.
void allocate(const Args& a, Shared* s, int threads) {
  const int64_t prepared = largest_prepared(a), low_rank = largest_low_rank(a);
  const int64_t workspace =
      LLAMA_OPS_BASE::paged_attention_workspace(attention_args(a, a.layers[0], *s), threads);
  float** floats[] = {&s->cos, &s->sin, &s->normed, &s->qkv, &s->attended, &s->gate_up, &s->inner};
  const int64_t sizes[] = {a.dim / 2, a.dim / 2, a.hidden, qkv_size(a), a.heads * a.dim, 2 * a.ffn,
                           a.ffn};
  const auto padded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t bytes = padded(prepared) + padded(low_rank) + padded(workspace);
  for (int64_t size : sizes) bytes += padded(a.tokens * size * 4);
  char* next = static_cast<char*>(scratch(kShared, bytes));
  const auto take = [&](int64_t size) {
    char* here = next;
    next += padded(size);
    return here;
  };
  for (int i = 0; i < 7; ++i) *floats[i] = reinterpret_cast<float*>(take(a.tokens * sizes[i] * 4));
  s->prepared = take(prepared);
  s->low_rank = take(low_rank);
  s->workspace = workspace == 0 ? nullptr : take(workspace);
}

// What a step takes on one thread, roughly: the longer of reading weights and keys and values of the
// tokens' past, and of multiplying with them.
double nanoseconds(const Args& a) {
  int64_t bytes = 0, keys = 0;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    const Layer& layer = a.layers[i];
    const llama_ops_linear_weight* all[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    for (const llama_ops_linear_weight* one : all) {
      bytes += one->outputs * llama_ops_linear_panel_bytes(one->kind, one->inputs) /
               LLAMA_OPS_LINEAR_PANEL;
    }
  }
  for (int64_t t = 0; t < a.tokens; ++t) keys += larger<int64_t>(0, a.position[t] + 1);
  const int64_t weights = a.hidden * (qkv_size(a) + a.heads * a.dim + 3 * a.ffn);
  const int64_t cached = 2 * a.num_layers * keys * a.dim;  // numbers of one head
  const int64_t size = a.cache_dtype == LLAMA_OPS_F32 ? 4 : a.cache_dtype == LLAMA_OPS_BF16 ? 2 : 1;
  bytes += cached * a.groups * size;
  const double products =
      static_cast<double>(a.num_layers * a.tokens * weights + cached * a.heads);
  double more = 0;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    for (int which = kQkv; which <= kDown; ++which) {
      const Layer& layer = a.layers[i];
      more += LLAMA_OPS_BASE::low_rank_work(layer.low_rank[which], inputs_of(layer, which));
    }
  }
  return more + larger(static_cast<double>(bytes) / kBytes, products / (2 * kWidth));
}

// One thread's work on all layers.
class Worker {
 public:
  Worker(const Args& args, Shared* shared, int thread, int threads)
      : a(args), s(*shared), thread(thread), threads(threads) {}

  void run() {
    if (thread == 0) allocate(a, &s, threads);
    sync();
    tables();
    const float* x = a.x;
    for (int64_t i = 0; i < a.num_layers; ++i) {
      const Layer& layer = a.layers[i];
      norm(x, layer.input_norm, layer.qkv);
      product(layer, kQkv, s.normed, nullptr, s.qkv);
      attention(layer);
      prepare(layer.o, s.attended);
      product(layer, kO, s.attended, x, a.out);
      x = a.out;
      norm(x, layer.post_norm, layer.gate_up);
      product(layer, kGateUp, s.normed, nullptr, s.gate_up);
      swiglu();
      prepare(layer.down, s.inner);
      product(layer, kDown, s.inner, x, a.out);
    }
  }

 private:
  void sync() { s.barrier.wait(threads); }

  // With one token, what comes before a product is less work than a barrier: each thread does all.
  bool alone() const { return a.tokens == 1; }

  // Angles as float32 products, which is how they are computed elsewhere.
  void tables() {
    const int64_t half = a.dim / 2;
    const Range tokens = share(a.tokens, 1, thread, threads);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(a.position[t]) * a.frequency[i];
        s.cos[t * half + i] = cosf(angle);
        s.sin[t * half + i] = sinf(angle);
      }
    }
  }

  llama_ops_linear_args linear(const llama_ops_linear_weight& weight, const float* x) {
    llama_ops_linear_args of{};
    of.weight = weight;
    of.x = x;
    of.rows = a.tokens;
    of.prepared = alone() ? scratch(kOwn, linear_prepared_bytes(weight, 1)) : s.prepared;
    return of;
  }

  // Normalises into s.normed and gets that ready for products with `next`.
  void norm(const float* x, const float* weight, const llama_ops_linear_weight& next) {
    llama_ops_rms_norm_forward_args of{};
    of.x = x;
    of.weight = weight;
    of.out = s.normed;
    of.rows = a.tokens;
    of.size = a.hidden;
    of.eps = a.eps;
    of.dtype = LLAMA_OPS_F32;
    LLAMA_OPS_BASE::rms_norm_forward_part(of, thread, threads);
    sync();
    prepare(next, s.normed);
  }

  void prepare(const llama_ops_linear_weight& weight, const float* x) {
    if (alone()) {
      linear_prepare_part(linear(weight, x), 0, 1);
    } else {
      linear_prepare_part(linear(weight, x), thread, threads);
      sync();
    }
  }

  void product(const Layer& layer, Which which, const float* x, const float* residual, float* out) {
    const llama_ops_linear_weight* weights[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
    const float* biases[] = {layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias};
    llama_ops_linear_args of = linear(*weights[which], x);
    of.bias = biases[which];
    of.residual = residual;
    of.out = out;
    linear_part(of, thread, threads);
    if (layer.low_rank[which].count > 0) return adapted(layer.low_rank[which], *weights[which], x, out);
    sync();
  }

  // What adapters add to a product, of which this thread has done its part.
  void adapted(const llama_ops_low_rank_pieces& pieces, const llama_ops_linear_weight& weight,
               const float* x, float* out) {
    llama_ops_low_rank_args of{};
    of.of = pieces;
    of.x = x;
    of.out = out;
    of.inputs = weight.inputs;
    of.width = weight.outputs;
    of.workspace = s.low_rank;
    LLAMA_OPS_BASE::low_rank_inner_part(of, thread, threads);
    sync();
    LLAMA_OPS_BASE::low_rank_outer_part(of, thread, threads);
    sync();
  }

  void attention(const Layer& layer) {
    const llama_ops_paged_attention_args of = attention_args(a, layer, s);
    LLAMA_OPS_BASE::cache_write_part(of, thread, threads);
    sync();
    LLAMA_OPS_BASE::paged_attention_part(of, s.workspace, thread, threads);
    sync();
    if (s.workspace == nullptr) return;
    LLAMA_OPS_BASE::paged_attention_merge_part(of, s.workspace, thread, threads);
    sync();
  }

  void swiglu() {
    llama_ops_swiglu_forward_args of{};
    of.gate = s.gate_up;
    of.up = s.gate_up + a.ffn;
    of.out = s.inner;
    of.rows = a.tokens;
    of.size = a.ffn;
    of.gate_stride = of.up_stride = 2 * a.ffn;
    of.dtype = LLAMA_OPS_F32;
    LLAMA_OPS_BASE::swiglu_forward_part(of, thread, threads);
    sync();
  }

  const Args& a;
  Shared& s;
  const int thread, threads;
};

}  // namespace

void decoder(const llama_ops_decoder_args& a) {
  if (a.tokens == 0 || a.num_layers == 0) return;
  Shared shared;
  on_threads(
      nanoseconds(a),
      [&](int thread, int threads) { Worker(a, &shared, thread, threads).run(); },
      kMeetings * a.num_layers);
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
