// Pieces of flash attention, forward and backward: tiles in shared memory, products of tiles, and
// which tiles and numbers are masked.
//
// A warp's product has kM * 16 rows. Products lie in registers as fragments of mma (mma.cuh), so
// thread `lane` holds rows 16 * m + lane / 4 + {0, 8} and columns 8 * n + 2 * (lane % 4) + {0, 1}.
#pragma once

#include "laboratory/cuda/mma.cuh"
#include "llama_ops/flash_attention.h"

namespace llama_ops {
namespace cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// Numbers from one row of a tile to the next. Without the 16 bytes between rows, the eight rows that
// ldmatrix reads at once would lie in the same banks; shuffling columns instead would cost a register
// for each address, where these are one address and constants.
template <int kSize>
constexpr int kPitch = kSize + 8;

// Where 16 bytes of a row of kSize numbers lie in a tile.
template <int kSize>
__device__ inline int place(int row, int chunk) {
  return row * kPitch<kSize> + 8 * chunk;
}

// Starts copying kRows rows, `stride` numbers apart, to a tile; rows from `count` on become zeros.
template <int kRows, int kSize, class T>
__device__ inline void copy_rows(T* tile, const T* from, int64_t stride, int count) {
  constexpr int kChunks = kSize / 8, kStep = kAttentionThreads / kChunks;
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  T* to = tile + place<kSize>(first, chunk);
  const T* at = from + first * stride + 8 * chunk;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    const bool valid = first + row < count;
    copy_async(to + row * kPitch<kSize>, at, valid);
    if (first + row + kStep < count) at += kStep * stride;
  }
}

// c [kM * 16, kN] += rows of `a` from `first` on, times all rows of b, transposed.
template <class T, int kSize, int kM, int kN>
__device__ inline void multiply_rows(float (&c)[kM][kN / 8][4], const T* a, int first, const T* b) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kSize / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices(left[m], a + place<kSize>(first + 16 * m + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      uint32_t right[4];
      load_matrices(right, b + place<kSize>(16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(c[m][2 * n], left[m], right[0], right[1], T{});
        mma(c[m][2 * n + 1], left[m], right[2], right[3], T{});
      }
    }
  }
}

// c [kM * 16, kSize] += a [kM * 16, kK] times all kK rows of b, with `a` a product of this warp,
// rounded to T here.
template <class T, int kSize, int kM, int kK>
__device__ inline void multiply_columns(float (&c)[kM][kSize / 8][4], const float (&a)[kM][kK / 8][4],
                                        const T* b) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* pair = a[m][2 * k + r / 2] + 2 * (r % 2);
        left[m][r] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kSize / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, b + place<kSize>(16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma(c[m][2 * n], left[m], right[0], right[1], T{});
        mma(c[m][2 * n + 1], left[m], right[2], right[3], T{});
      }
    }
  }
}

// Stores c * factor to the rows before `count`, `stride` numbers apart.
template <class T, int kSize, int kM>
__device__ inline void store_rows(T* to, int64_t stride, int count, const float (&c)[kM][kSize / 8][4],
                                  float factor) {
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kM * 16;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane / 4;
      if (row >= count) continue;
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        const float* pair = c[m][n] + 2 * half;
        *reinterpret_cast<uint32_t*>(to + row * stride + 8 * n + 2 * (lane % 4)) =
            pack<T>(pair[0] * factor, pair[1] * factor);
      }
    }
  }
}

// What a query of one document may see of a key, positions aside.
__device__ inline bool sees(int32_t query, int32_t key) {
  return query >= 0 && (key == query || key == LLAMA_OPS_EVERY_SEGMENT);
}

// How a tile stands to the rows that a block holds.
enum TileKind : uint8_t { kNothing = 0, kWhole = 1, kPartly = 2 };

// The documents among `count` positions.
struct Documents {
  int32_t low = INT32_MAX, high = -1;
  bool padding = false, every = false;
};

// Looks at all of a block's rows; every thread gets the answer. `slots` is shared memory for
// 4 * kAttentionWarps integers.
__device__ inline Documents documents_of(const int32_t* ids, int count, int32_t* slots) {
  Documents mine;
  for (int i = threadIdx.x; i < count; i += kAttentionThreads) {
    const int32_t id = ids[i];
    mine.every = mine.every || id == LLAMA_OPS_EVERY_SEGMENT;
    mine.padding = mine.padding || (id < 0 && id != LLAMA_OPS_EVERY_SEGMENT);
    if (id >= 0) mine.low = id < mine.low ? id : mine.low;
    mine.high = id > mine.high ? id : mine.high;
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t low = __shfl_xor_sync(kAllLanes, mine.low, distance);
    const int32_t high = __shfl_xor_sync(kAllLanes, mine.high, distance);
    mine.low = low < mine.low ? low : mine.low;
    mine.high = high > mine.high ? high : mine.high;
  }
  mine.every = __any_sync(kAllLanes, mine.every);
  mine.padding = __any_sync(kAllLanes, mine.padding);
  if (threadIdx.x % kWarp == 0) {
    int32_t* slot = slots + 4 * (threadIdx.x / kWarp);
    slot[0] = mine.low;
    slot[1] = mine.high;
    slot[2] = mine.every;
    slot[3] = mine.padding;
  }
  __syncthreads();
  for (int warp = 0; warp < kAttentionWarps; ++warp) {
    const int32_t* slot = slots + 4 * warp;
    mine.low = slot[0] < mine.low ? slot[0] : mine.low;
    mine.high = slot[1] > mine.high ? slot[1] : mine.high;
    mine.every = mine.every || slot[2];
    mine.padding = mine.padding || slot[3];
  }
  return mine;
}

// Marks each tile of kColumns positions, in `kinds`, by what it has to do with the rows held; with
// kKeysHeld those are keys and the tiles are queries, else the other way round. A tile that is left
// out of the work costs these few reads only, so packed documents cost what they cost alone.
template <int kColumns, bool kKeysHeld>
__device__ inline void mark_tiles(uint8_t* kinds, int begin, int end, const int32_t* ids, int count,
                                  const Documents& held) {
  const int lane = threadIdx.x % kWarp;
  const bool one = held.low == held.high && !held.padding && !held.every;
  for (int tile = begin + threadIdx.x / kWarp; tile < end; tile += kAttentionWarps) {
    bool any = false, whole = one;
    for (int i = tile * kColumns + lane; i < (tile + 1) * kColumns && i < count; i += kWarp) {
      const int32_t id = ids[i];
      const bool near = id >= held.low && id <= held.high;
      any = any || (kKeysHeld ? id >= 0 && (near || held.every)
                              : held.high >= 0 && (near || id == LLAMA_OPS_EVERY_SEGMENT));
      whole = whole && id == held.low;
    }
    any = __any_sync(kAllLanes, any);
    whole = !__any_sync(kAllLanes, !whole);
    if (lane == 0) kinds[tile] = !any ? kNothing : whole ? kWhole : kPartly;
  }
  __syncthreads();
}

// The first tile from `tile` on with work in it, or `end`; `kinds` is null without documents.
__device__ inline int next_tile(const uint8_t* kinds, int tile, int end) {
  while (kinds != nullptr && tile < end && kinds[tile] == kNothing) ++tile;
  return tile;
}

// Sets what queries do not see to -infinity. The block's rows start at position `first_row`, the
// tile's columns at `first_column`. `row_ids`, from the block's first row on, and `column_ids` name
// documents; without row_ids all positions are of one.
template <int kM, int kColumns, bool kKeysHeld>
__device__ inline void mask(float (&scores)[kM][kColumns / 8][4],
                            const llama_ops_flash_attention_forward_args& a, int first_row,
                            int first_column, const int32_t* row_ids, const int32_t* column_ids) {
  const int lane = threadIdx.x % kWarp;
  const int row = first_row + threadIdx.x / kWarp * kM * 16 + lane / 4;
  const int column = first_column + 2 * (lane % 4);
  // From here on rows and columns differ from these two by constants.
  const int prefix = static_cast<int>(a.prefix);
  const int reach = kKeysHeld ? column + prefix - row : row + prefix - column;
  const int columns = static_cast<int>(kKeysHeld ? a.queries : a.keys) - column;
  const int rows = static_cast<int>(kKeysHeld ? a.keys : a.queries) - row;
  int32_t ids[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int to = 16 * m + 8 * half;
      ids[m][half] = row_ids != nullptr && to < rows ? row_ids[row + to - first_row] : -1;
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int over = 8 * n + r;
      const bool documents = row_ids != nullptr && over < columns;
      const int32_t id = documents ? column_ids[column + over] : -1;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int down = 16 * m + 8 * half;
          bool seen = over < columns && (kKeysHeld ? down - over : over - down) <= reach;
          if (documents) seen = seen && (kKeysHeld ? sees(id, ids[m][half]) : sees(ids[m][half], id));
          if (!seen) scores[m][n][2 * half + r] = -INFINITY;
        }
      }
    }
  }
}

// Whether there are kernels for a call.
inline bool attention_supported(const llama_ops_flash_attention_forward_args& a) {
  return (a.dtype == LLAMA_OPS_BF16 || a.dtype == LLAMA_OPS_F16) && (a.size == 64 || a.size == 128) &&
         a.queries <= INT32_MAX / 2 && a.keys <= INT32_MAX / 2 && a.prefix <= a.keys &&
         aligned16(a.q) && aligned16(a.k) && aligned16(a.v) && aligned16(a.out);
}

}  // namespace cuda
}  // namespace llama_ops
