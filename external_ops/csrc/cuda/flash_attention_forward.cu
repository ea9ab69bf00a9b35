// Flash attention, forward; see llama_ops/flash_attention.h.
//
// A block takes 128 queries of one head, 32 a warp, and walks over tiles of keys. While scores are
// computed the tile's values are on their way, and during the second product the next tile's keys.
#include "cuda/attention_tiles.cuh"

namespace llama_ops {
namespace cuda {
namespace {

constexpr int kM = 2, kRows = kM * 16 * kAttentionWarps;

// Keys of a tile: as many as registers allow.
template <int kSize>
constexpr int kKeysOf = kSize == 64 ? 64 : 32;

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
                              const Softmax& softmax, const float (&out)[kM][kSize / 8][4]) {
  const int lane = threadIdx.x % kWarp, row = first + threadIdx.x / kWarp * kM * 16 + lane / 4;
  const int queries = static_cast<int>(a.queries);
  float* lse = a.lse + (batch * a.heads + head) * a.queries;
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      factor[m][half] = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
      const int query = row + 16 * m + 8 * half;
      if (lane % 4 == 0 && query < queries) {
        lse[query] = (softmax.most[m][half] + log2f(sum)) / kLog2E;
      }
    }
  }
  T* to = static_cast<T*>(a.out) + ((batch * a.queries + first) * a.heads + head) * kSize;
  store_rows<T, kSize, kM>(to, a.heads * kSize, queries - first, out, factor);
}

// One block's place in the work.
struct Place {
  int64_t batch, head;
  int first;  // query
  int tiles;  // of keys that the last of its queries may reach
};

template <int kKeys>
__device__ inline Place place_of(const Args& a) {
  Place at;
  at.batch = blockIdx.x / a.heads;
  at.head = blockIdx.x % a.heads;
  // The longest rows first, so that no block is left to run alone at the end.
  at.first = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kRows;
  const int64_t last = a.queries - 1 < at.first + kRows - 1 ? a.queries - 1 : at.first + kRows - 1;
  const int64_t reach = a.prefix + last + 1 < a.keys ? a.prefix + last + 1 : a.keys;
  at.tiles = reach > 0 ? static_cast<int>(ceil_div(reach, kKeys)) : 0;
  return at;
}

template <class T, int kSize>
__global__ void __launch_bounds__(kAttentionThreads) forward_kernel(Args a) {
  constexpr int kKeys = kKeysOf<kSize>;
  T* q_tile = reinterpret_cast<T*>(shared_memory());
  T* k_tile = q_tile + kRows * kSize;
  T* v_tile = k_tile + kKeys * kSize;
  const Place at = place_of<kKeys>(a);
  const int keys = static_cast<int>(a.keys), held = static_cast<int>(a.queries) - at.first;
  const int64_t group = at.head / (a.heads / a.groups), stride = a.groups * kSize;
  const int64_t offset = (at.batch * a.keys * a.groups + group) * kSize;
  const T *k = static_cast<const T*>(a.k) + offset, *v = static_cast<const T*>(a.v) + offset;
  const T* q = static_cast<const T*>(a.q) +
               ((at.batch * a.queries + at.first) * a.heads + at.head) * kSize;
  copy_rows<kRows, kSize>(q_tile, q, a.heads * kSize, held);

  const int32_t *row_documents = nullptr, *key_documents = nullptr;
  uint8_t* kinds = nullptr;
  if (a.segments != nullptr) {
    row_documents = a.segments + at.batch * a.queries + at.first;
    key_documents = a.key_segments + at.batch * a.keys;
    int32_t* slots = reinterpret_cast<int32_t*>(v_tile + kKeys * kSize);
    kinds = reinterpret_cast<uint8_t*>(slots + 4 * kAttentionWarps);
    const Documents documents = documents_of(row_documents, held < kRows ? held : kRows, slots);
    mark_tiles<kKeys, false>(kinds, 0, at.tiles, key_documents, keys, documents);
  }

  float out[kM][kSize / 8][4] = {};
  Softmax softmax;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    softmax.most[m][0] = softmax.most[m][1] = -INFINITY;
    softmax.sum[m][0] = softmax.sum[m][1] = 0.0f;
  }
  const int warp_row = threadIdx.x / kWarp * kM * 16;
  int tile = next_tile(kinds, 0, at.tiles);
  if (tile < at.tiles) {
    const int key = tile * kKeys;
    copy_rows<kKeys, kSize>(k_tile, k + key * stride, stride, keys - key);
  }
  commit_copies();
  while (tile < at.tiles) {
    const int key = tile * kKeys, following = next_tile(kinds, tile + 1, at.tiles);
    wait_copies<0>();
    __syncthreads();  // the keys are here, and nobody reads the last tile's values any more
    copy_rows<kKeys, kSize>(v_tile, v + key * stride, stride, keys - key);
    commit_copies();
    float scores[kM][kKeys / 8][4] = {};
    multiply_rows<T, kSize, kM, kKeys>(scores, q_tile, warp_row, k_tile);
    wait_copies<0>();
    __syncthreads();  // the values are here, and nobody reads these keys any more
    if (following < at.tiles) {
      const int next = following * kKeys;
      copy_rows<kKeys, kSize>(k_tile, k + next * stride, stride, keys - next);
      commit_copies();
    }
    const bool partly = kinds != nullptr && kinds[tile] == kPartly;
    if (partly || key + kKeys > keys || key + kKeys - 1 > a.prefix + at.first) {
      mask<kM, kKeys, false>(scores, a, at.first, key, partly ? row_documents : nullptr,
                             key_documents);
    }
    weigh<kSize, kKeys>(scores, softmax, out, a.scale * kLog2E);
    multiply_columns<T, kSize, kM, kKeys>(out, scores, v_tile);
    tile = following;
  }
  wait_copies<0>();
  finish<T, kSize>(a, at.batch, at.head, at.first, softmax, out);
}

template <class T, int kSize>
int forward(const Args& a, void* stream) {
  constexpr int kKeys = kKeysOf<kSize>;
  int64_t shared = (kRows + 2 * kKeys) * kSize * sizeof(T);
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
