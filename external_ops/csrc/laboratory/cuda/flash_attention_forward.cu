// Flash attention, forward; see llama_ops/flash_attention.h.
//
// A block takes 128 queries of one head, 32 a warp, and walks over tiles of keys. While scores are
// computed the tile's values are on their way, and during the second product the next tile's keys.
#include "laboratory/cuda/attention_tiles.cuh"

namespace llama_ops {
namespace cuda {
namespace {

constexpr int kM = 2, kRows = kM * 16 * kAttentionWarps;

// Keys of a tile: as many as registers allow.
template <int kSize>
constexpr int kKeysOf = kSize == 64 ? 64 : 48;

using Args = llama_ops_flash_attention_forward_args;

// Of the rows of one thread, in units of the exponent to base 2; sums are of this thread's columns.
struct Softmax {
  float most[kM][2], sum[kM][2];
};

// Turns scores into weights relative to the largest so far, and brings `out` to that scale.
template <int kSize, int kKeys>
__device__ inline void weigh(float (&scores)[kM][kKeys / 8][4], Softmax& softmax,
                             float (&out)[kM][kSize / 8][4], float scale) {
  float factor[kM][2];
  bool changed = false;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        most = fmaxf(most, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      most = fmaxf(most * scale, softmax.most[m][half]);
      // A row that has seen nothing yet keeps -infinity; 0 in its place keeps NaN away.
      const float base = most == -INFINITY ? 0.0f : most;
      factor[m][half] = exp2_fast(softmax.most[m][half] - base);
      changed = changed || most != softmax.most[m][half];
      softmax.most[m][half] = most;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = scores[m][n][2 * half + r];
          score = exp2_fast(score * scale - base);
          sum += score;
        }
      }
      softmax.sum[m][half] = softmax.sum[m][half] * factor[m][half] + sum;
    }
  }
  // After the first tiles the largest score seldom changes, and all factors are 1.
  if (!__any_sync(kAllLanes, changed)) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) out[m][n][r] *= factor[m][r / 2];
    }
  }
}

// Divides by the sums of whole rows, and writes results and lse.
template <class T, int kSize>
__device__ inline void finish(const Args& a, int64_t batch, int64_t head, int first,
                              const Softmax& softmax, float (&out)[kM][kSize / 8][4]) {
  const int lane = threadIdx.x % kWarp, row = first + threadIdx.x / kWarp * kM * 16 + lane / 4;
  const int queries = static_cast<int>(a.queries);
  float* lse = a.lse + (batch * a.heads + head) * a.queries;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float factor = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        out[m][n][2 * half] *= factor;
        out[m][n][2 * half + 1] *= factor;
      }
      const int query = row + 16 * m + 8 * half;
      if (lane % 4 == 0 && query < queries) {
        lse[query] = (softmax.most[m][half] + log2f(sum)) / kLog2E;
      }
    }
  }
  T* to = static_cast<T*>(a.out) + ((batch * a.queries + first) * a.heads + head) * kSize;
  store_rows<T, kSize, kM>(to, a.heads * kSize, queries - first, out, 1.0f);
}

// One block's place in the work, and its shared memory: queries, keys, values, slots, kinds of tiles.
template <class T, int kSize>
struct Block {
  static constexpr int kKeys = kKeysOf<kSize>;

  int batch, head, group;
  int first;  // query
  int tiles;  // of keys that the last of its queries may reach

  __device__ explicit Block(const Args& a) {
    batch = blockIdx.x / static_cast<int>(a.heads);
    head = blockIdx.x % static_cast<int>(a.heads);
    group = head / static_cast<int>(a.heads / a.groups);
    // The longest rows first, so that no block is left to run alone at the end.
    first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kRows;
    const int64_t last = first + kRows < a.queries ? first + kRows : a.queries;
    const int64_t reach = a.prefix + last < a.keys ? a.prefix + last : a.keys;
    tiles = reach > 0 ? static_cast<int>(ceil_div(reach, kKeys)) : 0;
  }

  __device__ T* queries() const { return reinterpret_cast<T*>(shared_memory()); }
  __device__ T* keys() const { return queries() + kRows * kPitch<kSize>; }
  __device__ T* values() const { return keys() + kKeys * kPitch<kSize>; }
  __device__ int32_t* slots() const {
    return reinterpret_cast<int32_t*>(values() + kKeys * kPitch<kSize>);
  }
  __device__ uint8_t* kinds() const {
    return reinterpret_cast<uint8_t*>(slots() + 4 * kAttentionWarps);
  }
  __device__ const int32_t* row_ids(const Args& a) const {
    return a.segments + batch * a.queries + first;
  }
  __device__ const int32_t* column_ids(const Args& a) const { return a.key_segments + batch * a.keys; }
};

// Starts copying a tile of keys or values, which begin at `from`.
template <class T, int kSize>
__device__ inline void fetch(const Args& a, const T* from, int64_t stride, int tile, T* to) {
  constexpr int kKeys = kKeysOf<kSize>;
  const int key = tile * kKeys;
  copy_rows<kKeys, kSize>(to, from + key * stride, stride, static_cast<int>(a.keys) - key);
  commit_copies();
}

// Starts copying the queries, and marks the tiles to walk over.
template <class T, int kSize>
__device__ inline void prepare(const Args& a, const Block<T, kSize>& block) {
  const int held = static_cast<int>(a.queries) - block.first;
  const int64_t row = block.batch * a.queries + block.first;
  const T* q = static_cast<const T*>(a.q) + (row * a.heads + block.head) * kSize;
  copy_rows<kRows, kSize>(block.queries(), q, a.heads * kSize, held);
  commit_copies();
  if (a.segments == nullptr) return;
  const int count = held < kRows ? held : kRows;
  const Documents documents = documents_of(block.row_ids(a), count, block.slots());
  mark_tiles<kKeysOf<kSize>, false>(block.kinds(), 0, block.tiles, block.column_ids(a),
                           static_cast<int>(a.keys), documents);
}

template <class T, int kSize>
__global__ void __launch_bounds__(kAttentionThreads) forward_kernel(Args a) {
  constexpr int kKeys = kKeysOf<kSize>;
  const Block<T, kSize> block(a);
  prepare(a, block);
  const uint8_t* kinds = a.segments == nullptr ? nullptr : block.kinds();
  float out[kM][kSize / 8][4] = {};
  Softmax softmax;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    softmax.most[m][0] = softmax.most[m][1] = -INFINITY;
    softmax.sum[m][0] = softmax.sum[m][1] = 0.0f;
  }
  const int64_t stride = a.groups * kSize;
  const int64_t at = block.batch * a.keys * stride + block.group * kSize;
  const T *k = static_cast<const T*>(a.k) + at, *v = static_cast<const T*>(a.v) + at;
  int tile = next_tile(kinds, 0, block.tiles);
  if (tile < block.tiles) fetch<T, kSize>(a, k, stride, tile, block.keys());
  while (tile < block.tiles) {
    const int key = tile * kKeys, following = next_tile(kinds, tile + 1, block.tiles);
    wait_copies<0>();
    __syncthreads();  // the keys are here, and nobody reads the last tile's values any more
    fetch<T, kSize>(a, v, stride, tile, block.values());
    float scores[kM][kKeys / 8][4] = {};
    const int warp_row = threadIdx.x / kWarp * kM * 16;
    multiply_rows<T, kSize, kM, kKeys>(scores, block.queries(), warp_row, block.keys());
    wait_copies<0>();
    __syncthreads();  // the values are here, and nobody reads these keys any more
    const bool partly = a.segments != nullptr && block.kinds()[tile] == kPartly;
    if (following < block.tiles) fetch<T, kSize>(a, k, stride, following, block.keys());
    if (partly || key + kKeys > a.keys || key + kKeys - 1 > a.prefix + block.first) {
      mask<kM, kKeys, false>(scores, a, block.first, key, partly ? block.row_ids(a) : nullptr,
                             partly ? block.column_ids(a) : nullptr);
    }
    weigh<kSize, kKeys>(scores, softmax, out, a.scale * kLog2E);
    multiply_columns<T, kSize, kM, kKeys>(out, scores, block.values());
    tile = following;
  }
  wait_copies<0>();
  finish<T, kSize>(a, block.batch, block.head, block.first, softmax, out);
}

template <class T, int kSize>
int forward(const Args& a, void* stream) {
  constexpr int kKeys = kKeysOf<kSize>;
  int64_t shared = (kRows + 2 * kKeys) * kPitch<kSize> * sizeof(T);
  if (a.segments != nullptr) shared += 4 * kAttentionWarps * sizeof(int32_t) + ceil_div(a.keys, kKeys);
  const dim3 grid(static_cast<unsigned>(a.batch * a.heads),
                  static_cast<unsigned>(ceil_div(a.queries, kRows)));
  return launch(forward_kernel<T, kSize>, grid, kAttentionThreads, shared, stream, a);
}

}  // namespace
}  // namespace cuda
}  // namespace llama_ops

int llama_ops_cuda_flash_attention_forward(const llama_ops_flash_attention_forward_args* args,
                                           void* stream) {
  using namespace llama_ops::cuda;
  if (!attention_supported(*args)) return LLAMA_OPS_CUDA_UNSUPPORTED;
  if (args->batch * args->queries * args->heads == 0) return 0;
  if (args->dtype == LLAMA_OPS_BF16) {
    return args->size == 64 ? forward<bf16, 64>(*args, stream) : forward<bf16, 128>(*args, stream);
  }
  return args->size == 64 ? forward<f16, 64>(*args, stream) : forward<f16, 128>(*args, stream);
}
