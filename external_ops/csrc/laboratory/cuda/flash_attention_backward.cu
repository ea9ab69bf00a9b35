// Flash attention, backward; see llama_ops/flash_attention.h.
//
// Two kernels recompute the weights: one holds keys and walks over queries, for the gradients of keys
// and values; the other holds queries and walks over keys, for those of queries. That is two products
// more than one kernel that does both, but no sum depends on which block comes first. Both compute
//   weights = exp(scores - lse)         scores of held rows times walked columns
//   through = weights * (up - delta)    up: gradient of the weights; delta: sum of grad_out * out
//   grad    = through * walked * scale  and, for values, weights * walked grad_out
// with the weights of held rows as rows, so that products stay in registers between the steps.
#include "laboratory/cuda/attention_tiles.cuh"

namespace llama_ops {
namespace cuda {
namespace {

// What a query's row needs beside q and grad_out. Rows end at a multiple of kStatRows; those past the
// last query have an infinite lse, which makes all weights 0, as have rows that see nothing.
struct alignas(8) Stat {
  float lse;  // to base 2
  float delta;
};

constexpr int kStatRows = 128;

struct BackwardArgs {
  llama_ops_flash_attention_backward_args a;
  Stat* stats;        // [batch, heads, stat_rows]
  int64_t stat_rows;  // of one head
};

// Tiles: held rows are 16 * kM a warp; kColumns are walked at once. As many as registers allow.
template <int kSize, bool kKeysHeld>
struct Shape {
  static constexpr int kM = kSize == 128 && kKeysHeld ? 1 : 2;
  static constexpr int kColumns = kSize == 64 && !kKeysHeld ? 64 : 32;
  static constexpr int kRows = 16 * kM * kAttentionWarps;
};

template <class T, int kSize>
__global__ void __launch_bounds__(kAttentionThreads) stat_kernel(BackwardArgs args) {
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  constexpr int kLanes = kSize / 8;  // of one row
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kLanes) +
                        threadIdx.x / kLanes;
  const int64_t query = index % args.stat_rows, batch_head = index / args.stat_rows;
  if (batch_head >= a.batch * a.heads) return;  // whole warps: stat_rows is a multiple of 32
  Stat stat{INFINITY, 0.0f};
  if (query < a.queries) {
    const int64_t batch = batch_head / a.heads, head = batch_head % a.heads;
    const int64_t at = ((batch * a.queries + query) * a.heads + head) * kSize +
                       8 * (threadIdx.x % kLanes);
    const auto out = load<8>(static_cast<const T*>(a.out) + at);
    const auto grad = load<8>(static_cast<const T*>(args.a.grad_out) + at);
#pragma unroll
    for (int i = 0; i < 8; ++i) stat.delta += widen(out.at[i]) * widen(grad.at[i]);
    const float lse = a.lse[batch_head * a.queries + query];
    if (lse != -INFINITY) stat.lse = lse * kLog2E;
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    stat.delta += __shfl_xor_sync(kAllLanes, stat.delta, distance);
  }
  if (threadIdx.x % kLanes == 0) args.stats[index] = stat;
}

// Two tensors of one head: q and grad_out, or k and v. The first belongs to scores, the second to up.
template <class T>
struct Operands {
  const T *first, *second;
  int64_t stride;
  int rows;
};

// Those of queries or keys; `head` counts the heads that the tensors have.
template <class T, int kSize, bool kKeys>
__device__ inline Operands<T> operands_of(const BackwardArgs& args, int64_t batch, int64_t head) {
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const int64_t rows = kKeys ? a.keys : a.queries, heads = kKeys ? a.groups : a.heads;
  const int64_t at = (batch * rows * heads + head) * kSize;
  return {static_cast<const T*>(kKeys ? a.k : a.q) + at,
          static_cast<const T*>(kKeys ? a.v : args.a.grad_out) + at, heads * kSize,
          static_cast<int>(rows)};
}

// Starts copying rows `first` to first + kRows of both tensors, the second right behind the first.
template <int kRows, int kSize, class T>
__device__ inline void copy_both(T* tiles, const Operands<T>& from, int first) {
  const int64_t at = first * from.stride;
  copy_rows<kRows, kSize>(tiles, from.first + at, from.stride, from.rows - first);
  copy_rows<kRows, kSize>(tiles + kRows * kPitch<kSize>, from.second + at, from.stride,
                          from.rows - first);
}

// What a block holds and where it walks: tiles begin to end, once for each of `heads` query heads.
template <class T, int kSize, bool kKeysHeld>
struct Block {
  using S = Shape<kSize, kKeysHeld>;
  static constexpr int kStats = kKeysHeld ? 2 * S::kColumns : S::kRows;

  int batch, head;  // the head counts those of the held tensors
  int first;        // held row
  int begin, end, heads;

  __device__ explicit Block(const llama_ops_flash_attention_forward_args& a) {
    const int across = static_cast<int>(kKeysHeld ? a.groups : a.heads);
    batch = blockIdx.x / across;
    head = blockIdx.x % across;
    // The longest walks first: low keys have the most queries, high queries the most keys.
    first = static_cast<int>(kKeysHeld ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * S::kRows;
    heads = kKeysHeld ? static_cast<int>(a.heads / a.groups) : 1;
    const int64_t last = first + S::kRows < a.queries ? first + S::kRows : a.queries;
    const int64_t reach = a.prefix + last < a.keys ? a.prefix + last : a.keys;
    const int64_t earliest = first - a.prefix;
    begin = kKeysHeld && earliest > 0 ? static_cast<int>(earliest / S::kColumns) : 0;
    end = static_cast<int>(ceil_div(kKeysHeld ? a.queries : reach > 0 ? reach : 0, S::kColumns));
  }

  // Shared memory: held tiles, two stages of walked tiles, stats, slots, kinds of tiles.
  __device__ T* held() const { return reinterpret_cast<T*>(shared_memory()); }
  __device__ T* walked(int stage) const {
    return held() + (2 * S::kRows + stage * 2 * S::kColumns) * kPitch<kSize>;
  }
  __device__ Stat* stats() const { return reinterpret_cast<Stat*>(walked(2)); }
  __device__ int32_t* slots() const { return reinterpret_cast<int32_t*>(stats() + kStats); }
  __device__ uint8_t* kinds() const {
    return reinterpret_cast<uint8_t*>(slots() + 4 * kAttentionWarps);
  }

  __device__ const int32_t* row_ids(const llama_ops_flash_attention_forward_args& a) const {
    return (kKeysHeld ? a.key_segments + batch * a.keys : a.segments + batch * a.queries) + first;
  }
  __device__ const int32_t* column_ids(const llama_ops_flash_attention_forward_args& a) const {
    return kKeysHeld ? a.segments + batch * a.queries : a.key_segments + batch * a.keys;
  }
};

// Starts copying what queries from `first` on of one query head need beside their rows.
template <int kCount>
__device__ inline void copy_stats(Stat* to, const BackwardArgs& args, int batch, int64_t head,
                                  int first) {
  constexpr int kPer = 16 / sizeof(Stat);
  const Stat* from = args.stats + (batch * args.a.forward.heads + head) * args.stat_rows + first;
  if (threadIdx.x < kCount / kPer) {
    copy_async(to + kPer * threadIdx.x, from + kPer * threadIdx.x, true);
  }
}

// Starts copying what the block holds, and marks the tiles to walk over.
template <class T, int kSize, bool kKeysHeld>
__device__ inline void prepare(const BackwardArgs& args, const Block<T, kSize, kKeysHeld>& block) {
  using S = Shape<kSize, kKeysHeld>;
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const auto held = operands_of<T, kSize, kKeysHeld>(args, block.batch, block.head);
  copy_both<S::kRows, kSize>(block.held(), held, block.first);
  if (!kKeysHeld) copy_stats<S::kRows>(block.stats(), args, block.batch, block.head, block.first);
  if (a.segments == nullptr) return;
  const int count = held.rows - block.first < S::kRows ? held.rows - block.first : S::kRows;
  const Documents documents = documents_of(block.row_ids(a), count, block.slots());
  mark_tiles<S::kColumns, kKeysHeld>(block.kinds(), block.begin, block.end, block.column_ids(a),
                                     static_cast<int>(kKeysHeld ? a.queries : a.keys), documents);
}

// Starts copying a tile of the given query head of the block's.
template <class T, int kSize, bool kKeysHeld>
__device__ inline void fetch(const BackwardArgs& args, const Block<T, kSize, kKeysHeld>& block,
                             int head, int tile, int stage) {
  using S = Shape<kSize, kKeysHeld>;
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const int64_t other = kKeysHeld ? block.head * (a.heads / a.groups) + head
                                  : block.head / (a.heads / a.groups);
  const auto walked = operands_of<T, kSize, !kKeysHeld>(args, block.batch, other);
  const int column = tile * S::kColumns;
  copy_both<S::kColumns, kSize>(block.walked(stage), walked, column);
  if (kKeysHeld) {
    Stat* to = block.stats() + stage * S::kColumns;
    copy_stats<S::kColumns>(to, args, block.batch, other, column);
  }
}

// Scores become weights. Stats are those of columns where keys are held, else of the warp's rows.
template <int kM, int kColumns, bool kKeysHeld>
__device__ inline void weigh(float (&scores)[kM][kColumns / 8][4], const Stat* stats, float scale) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 16 * m + 8 * (r / 2) + lane / 4, column = 8 * n + 2 * (lane % 4) + r % 2;
        const float lse = stats[kKeysHeld ? column : row].lse;
        scores[m][n][r] = exp2_fast(scores[m][n][r] * scale - lse);
      }
    }
  }
}

// The gradient of the weights becomes that of the scores, the scale aside.
template <int kM, int kColumns, bool kKeysHeld>
__device__ inline void differentiate(float (&up)[kM][kColumns / 8][4],
                                     const float (&weights)[kM][kColumns / 8][4],
                                     const Stat* stats) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 16 * m + 8 * (r / 2) + lane / 4, column = 8 * n + 2 * (lane % 4) + r % 2;
        up[m][n][r] = weights[m][n][r] * (up[m][n][r] - stats[kKeysHeld ? column : row].delta);
      }
    }
  }
}

// Adds one tile's part to the gradients.
template <class T, int kSize, bool kKeysHeld, int kM>
__device__ inline void add_tile(const llama_ops_flash_attention_forward_args& a,
                                const Block<T, kSize, kKeysHeld>& block, int tile, int stage,
                                float (&first_grad)[kM][kSize / 8][4],
                                float (&second_grad)[kM][kSize / 8][4]) {
  using S = Shape<kSize, kKeysHeld>;
  constexpr int kColumns = S::kColumns;
  const int warp_row = threadIdx.x / kWarp * kM * 16, column = tile * kColumns;
  const T *held = block.held(), *walked = block.walked(stage);
  float scores[kM][kColumns / 8][4] = {}, up[kM][kColumns / 8][4] = {};
  multiply_rows<T, kSize, kM, kColumns>(scores, held, warp_row, walked);
  const bool partly = a.segments != nullptr && block.kinds()[tile] == kPartly;
  const int64_t ahead =
      kKeysHeld ? block.first + S::kRows - 1 - column : column + kColumns - 1 - block.first;
  if (partly || ahead > a.prefix || (!kKeysHeld && column + kColumns > a.keys)) {
    mask<kM, kColumns, kKeysHeld>(scores, a, block.first, column, partly ? block.row_ids(a) : nullptr,
                                  partly ? block.column_ids(a) : nullptr);
  }
  const Stat* stats = block.stats() + (kKeysHeld ? stage * kColumns : warp_row);
  weigh<kM, kColumns, kKeysHeld>(scores, stats, a.scale * kLog2E);
  const T* walked_second = walked + kColumns * kPitch<kSize>;
  if (kKeysHeld) multiply_columns<T, kSize, kM, kColumns>(second_grad, scores, walked_second);
  multiply_rows<T, kSize, kM, kColumns>(up, held + S::kRows * kPitch<kSize>, warp_row, walked_second);
  differentiate<kM, kColumns, kKeysHeld>(up, scores, stats);
  multiply_columns<T, kSize, kM, kColumns>(first_grad, up, walked);
}

template <class T, int kSize, bool kKeysHeld>
__global__ void __launch_bounds__(kAttentionThreads) backward_kernel(BackwardArgs args) {
  constexpr int kM = Shape<kSize, kKeysHeld>::kM;
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const Block<T, kSize, kKeysHeld> block(a);
  prepare(args, block);
  const uint8_t* kinds = a.segments == nullptr ? nullptr : block.kinds();
  float first_grad[kM][kSize / 8][4] = {}, second_grad[kM][kSize / 8][4] = {};
  const int start = next_tile(kinds, block.begin, block.end);
  int head = start < block.end ? 0 : block.heads, tile = start, stage = 0;
  if (head < block.heads) fetch(args, block, head, tile, stage);
  commit_copies();
  while (head < block.heads) {
    wait_copies<0>();
    __syncthreads();  // this stage is here, and nobody reads the other any more
    const int here = tile;
    tile = next_tile(kinds, tile + 1, block.end);
    if (tile == block.end) {
      tile = start;
      ++head;
    }
    if (head < block.heads) {
      fetch(args, block, head, tile, stage ^ 1);
      commit_copies();
    }
    add_tile(a, block, here, stage, first_grad, second_grad);
    stage ^= 1;
  }
  wait_copies<0>();

  const int64_t rows = kKeysHeld ? a.keys : a.queries, across = kKeysHeld ? a.groups : a.heads;
  const int64_t at = ((block.batch * rows + block.first) * across + block.head) * kSize;
  const int count = static_cast<int>(rows) - block.first;
  T* to = static_cast<T*>(kKeysHeld ? args.a.grad_k : args.a.grad_q) + at;
  store_rows<T, kSize, kM>(to, across * kSize, count, first_grad, a.scale);
  if (kKeysHeld) {
    store_rows<T, kSize, kM>(static_cast<T*>(args.a.grad_v) + at, across * kSize, count, second_grad,
                             1.0f);
  }
}

template <class T, int kSize, bool kKeysHeld>
int walk_over(const BackwardArgs& args, void* stream) {
  using S = Shape<kSize, kKeysHeld>;
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const int64_t rows = kKeysHeld ? a.keys : a.queries, columns = kKeysHeld ? a.queries : a.keys;
  if (rows == 0) return 0;
  int64_t shared = (2 * S::kRows + 4 * S::kColumns) * kPitch<kSize> * sizeof(T);
  shared += Block<T, kSize, kKeysHeld>::kStats * sizeof(Stat);
  if (a.segments != nullptr) {
    shared += 4 * kAttentionWarps * sizeof(int32_t) + ceil_div(columns, S::kColumns);
  }
  const dim3 grid(static_cast<unsigned>(a.batch * (kKeysHeld ? a.groups : a.heads)),
                  static_cast<unsigned>(ceil_div(rows, S::kRows)));
  return launch(backward_kernel<T, kSize, kKeysHeld>, grid, kAttentionThreads, shared, stream, args);
}

template <class T, int kSize>
int backward(const BackwardArgs& args, void* stream) {
  const llama_ops_flash_attention_forward_args& a = args.a.forward;
  const int64_t rows = a.batch * a.heads * args.stat_rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kAttentionThreads / (kSize / 8))));
  int failed = rows == 0 ? 0 : launch(stat_kernel<T, kSize>, grid, kAttentionThreads, 0, stream, args);
  if (!failed) failed = walk_over<T, kSize, true>(args, stream);
  return failed ? failed : walk_over<T, kSize, false>(args, stream);
}

int64_t stat_rows_of(const llama_ops_flash_attention_forward_args& a) {
  return ceil_div(a.queries, kStatRows) * kStatRows;
}

}  // namespace
}  // namespace cuda
}  // namespace llama_ops

int64_t llama_ops_cuda_flash_attention_backward_workspace(
    const llama_ops_flash_attention_backward_args* args) {
  using namespace llama_ops::cuda;
  const llama_ops_flash_attention_forward_args& a = args->forward;
  return a.batch * a.heads * stat_rows_of(a) * static_cast<int64_t>(sizeof(Stat));
}

int llama_ops_cuda_flash_attention_backward(const llama_ops_flash_attention_backward_args* args,
                                            void* workspace, void* stream) {
  using namespace llama_ops::cuda;
  const llama_ops_flash_attention_forward_args& a = args->forward;
  if (!attention_supported(a) || !aligned16(args->grad_out)) return LLAMA_OPS_CUDA_UNSUPPORTED;
  if (a.batch * a.heads == 0) return 0;
  const BackwardArgs both{*args, static_cast<Stat*>(workspace), stat_rows_of(a)};
  if (a.dtype == LLAMA_OPS_BF16) {
    return a.size == 64 ? backward<bf16, 64>(both, stream) : backward<bf16, 128>(both, stream);
  }
  return a.size == 64 ? backward<f16, 64>(both, stream) : backward<f16, 128>(both, stream);
}
