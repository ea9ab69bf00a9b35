// Products with 8-bit and 4-bit weights; see llama_ops/cuda.h.
//
// Weights go from memory into registers and from there, widened, into mma as its A operand; no other
// copy of them is ever made. Which 16 inputs one mma sums over does not matter as long as both
// operands agree, so each lane takes neighbouring inputs of its row, 16 bytes at once, where the
// instruction's own order would scatter them. Tokens are the columns of B.
//
// Up to 16 tokens, memory bounds the product: the warps of a block share 16 outputs and divide the
// inputs. With more, a block computes 128 outputs of 64 tokens, with x in shared memory.
#include "laboratory/cuda/mma.cuh"

namespace llama_ops {
namespace cuda {
namespace {

constexpr int kFewWarps = 8, kManyWarps = 4;
constexpr int kTokens = 64, kStep = 64, kPitch = kStep + 8;  // of the kernel for many tokens

// Half precision has few exponents: small scales would lose digits without this factor.
template <class T>
constexpr float kLift = 1.0f;
template <>
constexpr float kLift<f16> = 16.0f;

struct LinearArgs {
  llama_ops_cuda_linear_args a;
  int shift;  // input >> shift is its group
};

// One factor for both numbers of a pair.
struct Scale {
  float wide;
  uint32_t pair;
};

// The scale of input k of a row; 1 with one group, since the whole sum is multiplied at the end.
template <class T>
__device__ inline Scale scale_at(const LinearArgs& args, int64_t row, int k) {
  float scale = kLift<T>;
  if (args.a.groups > 1) scale *= args.a.scale[row * args.a.groups + (k >> args.shift)];
  return {scale, pack<T>(scale, scale)};
}

// Eight weights, in pairs that go together in one register: (0, 1), (2, 3), (4, 5), (6, 7) for 8 bits
// and (0, 4), (1, 5), (2, 6), (3, 7) for 4, where this takes the fewest instructions. A byte becomes
// the mantissa of a number known otherwise, and that number is subtracted again, exactly.
__device__ inline void widen_eight(const uint32_t (&words)[2], const Scale& scale,
                                   uint32_t (&pairs)[4], f16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t offset = words[i / 2] ^ 0x80808080u;  // + 128
    const uint32_t both = __byte_perm(offset, 0x64646464u, i % 2 ? 0x4342 : 0x4140);
    pairs[i] = multiply_pair(add_pair(both, 0xe480e480u, f16{}), scale.pair, f16{});  // - 1152
  }
}
__device__ inline void widen_eight(const uint32_t (&words)[2], const Scale& scale,
                                   uint32_t (&pairs)[4], bf16) {
  // Too few mantissa bits in bfloat16: through float32, 2^23 + byte.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t offset = words[i / 2] ^ 0x80808080u;
    float two[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t bits = __byte_perm(offset, 0x4b000000u, 0x7440 + 2 * (i % 2) + j);
      two[j] = (__uint_as_float(bits) - 8388736.0f) * scale.wide;
    }
    pairs[i] = pack<bf16>(two[0], two[1]);
  }
}
__device__ inline void widen_eight(const uint32_t (&words)[1], const Scale& scale,
                                   uint32_t (&pairs)[4], f16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t both = ((words[0] >> (4 * i)) & 0x000f000fu) | 0x64006400u;
    pairs[i] = multiply_pair(add_pair(both, 0xe408e408u, f16{}), scale.pair, f16{});  // - 1032
  }
}
__device__ inline void widen_eight(const uint32_t (&words)[1], const Scale& scale,
                                   uint32_t (&pairs)[4], bf16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t both = ((words[0] >> (4 * i)) & 0x000f000fu) | 0x43004300u;
    pairs[i] = multiply_pair(add_pair(both, 0xc308c308u, bf16{}), scale.pair, bf16{});  // - 136
  }
}

// Puts eight inputs, (0, 1) to (6, 7), in the order of the weights.
template <int kBits>
__device__ inline void order(uint32_t (&x)[4]) {
  if (kBits == 8) return;
  const uint32_t from[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __byte_perm(from[i / 2], from[2 + i / 2], i % 2 ? 0x7632 : 0x5410);
  }
}

// sums += eight inputs of 16 outputs; `upper` are rows 0 to 7, `lower` rows 8 to 15.
template <class T>
__device__ inline void multiply_eight(float (&sums)[4], const uint32_t (&upper)[4],
                                      const uint32_t (&lower)[4], const uint32_t (&x)[4]) {
  const uint32_t front[4] = {upper[0], lower[0], upper[1], lower[1]};
  const uint32_t back[4] = {upper[2], lower[2], upper[3], lower[3]};
  mma(sums, front, x[0], x[1], T{});
  mma(sums, back, x[2], x[3], T{});
}

// The words of the eight inputs `part` among those that a lane has loaded.
template <int kBits, int kWords>
__device__ inline void words_of(const Vector<uint32_t, kWords>& loaded, int part,
                                uint32_t (&words)[kBits / 4]) {
#pragma unroll
  for (int i = 0; i < kBits / 4; ++i) words[i] = loaded.at[part * (kBits / 4) + i];
}

// The address of a row's weights from input k on.
template <int kBits>
__device__ inline const uint32_t* weights_at(const LinearArgs& args, int64_t row, int k) {
  const uint8_t* bytes = static_cast<const uint8_t*>(args.a.weight);
  return reinterpret_cast<const uint32_t*>(bytes + (row * args.a.inputs + k) * kBits / 8);
}

// What a sum becomes: the scale of a single group, the lift taken back, the bias.
template <class T>
__device__ inline void store_sum(const LinearArgs& args, int64_t token, int64_t output, float sum) {
  const llama_ops_cuda_linear_args& a = args.a;
  if (token >= a.rows || output >= a.outputs) return;
  float value = sum * (1.0f / kLift<T>);
  if (a.groups == 1) value *= a.scale[output];
  if (a.bias != nullptr) value += widen(static_cast<const T*>(a.bias)[output]);
  static_cast<T*>(a.out)[token * a.outputs + output] = narrow<T>(value);
}

// Adds the inputs of one step, 512 / kBits of them for the whole warp.
template <class T, int kBits, int kN>
__device__ inline void add_step(const LinearArgs& args, const int64_t (&rows)[2], int64_t first_token,
                                int k, float (&sums)[kN][4]) {
  constexpr int kParts = 16 / kBits;  // of eight inputs in the 16 bytes of a lane
  const int64_t token = first_token + threadIdx.x % kWarp / 4;
  const auto upper = load<4>(weights_at<kBits>(args, rows[0], k));
  const auto lower = load<4>(weights_at<kBits>(args, rows[1], k));
  const Scale scales[2] = {scale_at<T>(args, rows[0], k), scale_at<T>(args, rows[1], k)};
  const uint32_t* x = static_cast<const uint32_t*>(args.a.x);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    uint32_t words[kBits / 4], pairs[2][4];
    words_of<kBits>(upper, part, words);
    widen_eight(words, scales[0], pairs[0], T{});
    words_of<kBits>(lower, part, words);
    widen_eight(words, scales[1], pairs[1], T{});
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      Vector<uint32_t, 4> eight{};
      if (token + 8 * n < args.a.rows) {
        eight = load<4>(x + ((token + 8 * n) * args.a.inputs + k) / 2 + 4 * part);
      }
      order<kBits>(eight.at);
      multiply_eight<T>(sums[n], pairs[0], pairs[1], eight.at);
    }
  }
}

// 16 outputs of kN * 8 tokens a block.
template <class T, int kBits, int kN>
__global__ void __launch_bounds__(kFewWarps * kWarp) few_kernel(LinearArgs args) {
  constexpr int kLane = 128 / kBits;  // inputs in a lane's 16 bytes
  const llama_ops_cuda_linear_args& a = args.a;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * 16, first_token = blockIdx.y * 8 * kN;
  int64_t rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = output + 8 * half + lane / 4;
    rows[half] = row < a.outputs ? row : a.outputs - 1;
  }
  float sums[kN][4] = {};
  const int inputs = static_cast<int>(a.inputs), whole = inputs / (4 * kLane) * (4 * kLane);
#pragma unroll 2
  for (int k = warp * 4 * kLane; k < whole; k += kFewWarps * 4 * kLane) {
    add_step<T, kBits, kN>(args, rows, first_token, k + lane % 4 * kLane, sums);
  }
  if (whole < inputs && whole / (4 * kLane) % kFewWarps == warp) {
    // Lanes without inputs of their own read the last ones, and add nothing: their tokens are past
    // the end.
    const int k = whole + lane % 4 * kLane;
    const int64_t token = k < inputs ? first_token : a.rows;
    add_step<T, kBits, kN>(args, rows, token, k < inputs ? k : inputs - kLane, sums);
  }
  float* all = reinterpret_cast<float*>(shared_memory());  // [warp, token, output]
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int token = 8 * n + 2 * (lane % 4) + r % 2, row = lane / 4 + 8 * (r / 2);
      all[(warp * kN * 8 + token) * 16 + row] = sums[n][r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kN * 8 * 16; i += kFewWarps * kWarp) {
    float total = 0.0f;
    for (int w = 0; w < kFewWarps; ++w) total += all[w * kN * 8 * 16 + i];
    store_sum<T>(args, first_token + i / 16, output + i % 16, total);
  }
}

// A lane's weights of one step of the kernel for many tokens: 16 inputs of four rows.
template <int kBits>
struct Held {
  Vector<uint32_t, kBits / 2> rows[2][2];
};

template <int kBits>
__device__ inline Held<kBits> hold(const LinearArgs& args, const int64_t (&rows)[2][2], int k) {
  Held<kBits> held;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    held.rows[i / 2][i % 2] = load<kBits / 2>(weights_at<kBits>(args, rows[i / 2][i % 2], k));
  }
  return held;
}

// Starts copying kStep inputs of the block's tokens; what lies outside becomes zeros.
template <class T>
__device__ inline void copy_inputs(const LinearArgs& args, int64_t first_token, int k, T* to) {
  constexpr int kChunks = kStep / 8;
  const T* x = static_cast<const T*>(args.a.x);
  for (int i = threadIdx.x; i < kTokens * kChunks; i += kManyWarps * kWarp) {
    const int64_t token = first_token + i / kChunks;
    const int column = k + i % kChunks * 8;
    const bool valid = token < args.a.rows && column < args.a.inputs;
    copy_async(to + i / kChunks * kPitch + i % kChunks * 8,
               valid ? x + token * args.a.inputs + column : x, valid);
  }
  commit_copies();
}

// 128 outputs, 32 a warp, of kTokens tokens a block.
template <class T, int kBits>
__global__ void __launch_bounds__(kManyWarps * kWarp) many_kernel(LinearArgs args) {
  const llama_ops_cuda_linear_args& a = args.a;
  const int lane = threadIdx.x % kWarp, inputs = static_cast<int>(a.inputs);
  const int64_t output = (static_cast<int64_t>(blockIdx.x) * kManyWarps + threadIdx.x / kWarp) * 32;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kTokens;
  T* x = reinterpret_cast<T*>(shared_memory());  // two stages
  int64_t rows[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = output + 8 * i + lane / 4;
    rows[i / 2][i % 2] = row < a.outputs ? row : a.outputs - 1;
  }
  // Past the inputs lanes read the last ones again, which meet zeros.
  const auto mine = [&](int k) {
    const int at = k + lane % 4 * 16;
    return at < inputs ? at : inputs - 16;
  };
  float sums[2][kTokens / 8][4] = {};
  copy_inputs(args, first_token, 0, x);
  Held<kBits> next = hold<kBits>(args, rows, mine(0));
  for (int k = 0, stage = 0; k < inputs; k += kStep, stage ^= 1) {
    const Held<kBits> held = next;
    wait_copies<0>();
    __syncthreads();  // this stage is here, and nobody reads the other any more
    if (k + kStep < inputs) {
      copy_inputs(args, first_token, k + kStep, x + (stage ^ 1) * kTokens * kPitch);
      next = hold<kBits>(args, rows, mine(k + kStep));
    }
    Scale scales[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i / 2][i % 2] = scale_at<T>(args, rows[i / 2][i % 2], mine(k));
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t pairs[2][2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t words[kBits / 4];
        words_of<kBits>(held.rows[i / 2][i % 2], part, words);
        widen_eight(words, scales[i / 2][i % 2], pairs[i / 2][i % 2], T{});
      }
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        const T* token = x + (stage * kTokens + 8 * n + lane / 4) * kPitch;
        auto eight = load<4>(reinterpret_cast<const uint32_t*>(token + lane % 4 * 16 + 8 * part));
        order<kBits>(eight.at);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_eight<T>(sums[m][n], pairs[m][0], pairs[m][1], eight.at);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        store_sum<T>(args, first_token + 8 * n + 2 * (lane % 4) + r % 2,
                     output + 16 * m + 8 * (r / 2) + lane / 4, sums[m][n][r]);
      }
    }
  }
}

template <class T, int kBits, int kN>
int few(const LinearArgs& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.a.outputs, 16)));
  const int64_t shared = kFewWarps * kN * 8 * 16 * sizeof(float);
  return launch(few_kernel<T, kBits, kN>, grid, kFewWarps * kWarp, shared, stream, args);
}

template <class T, int kBits>
int multiply(const LinearArgs& args, void* stream) {
  if (args.a.rows <= 8) return few<T, kBits, 1>(args, stream);
  if (args.a.rows <= 16) return few<T, kBits, 2>(args, stream);
  const dim3 grid(static_cast<unsigned>(ceil_div(args.a.outputs, 32 * kManyWarps)),
                  static_cast<unsigned>(ceil_div(args.a.rows, kTokens)));
  const int64_t shared = 2 * kTokens * kPitch * sizeof(T);
  return launch(many_kernel<T, kBits>, grid, kManyWarps * kWarp, shared, stream, args);
}

bool supported(const llama_ops_cuda_linear_args& a) {
  if ((a.bits != 8 && a.bits != 4) || (a.dtype != LLAMA_OPS_BF16 && a.dtype != LLAMA_OPS_F16)) return false;
  const int64_t lane = 128 / a.bits;
  if (a.groups < 1 || a.inputs % lane || a.inputs % a.groups || a.inputs > INT32_MAX / 2) return false;
  const int64_t group = a.inputs / a.groups;
  const bool groups = a.groups == 1 || (group >= lane && (group & (group - 1)) == 0);
  return groups && aligned16(a.x) && aligned16(a.weight);
}

}  // namespace
}  // namespace cuda
}  // namespace llama_ops

int llama_ops_cuda_linear(const llama_ops_cuda_linear_args* args, void* stream) {
  using namespace llama_ops::cuda;
  if (!supported(*args)) return LLAMA_OPS_CUDA_UNSUPPORTED;
  if (args->rows == 0 || args->outputs == 0) return 0;
  LinearArgs both{*args, 0};
  while (args->inputs / args->groups >> (both.shift + 1)) ++both.shift;
  if (args->dtype == LLAMA_OPS_BF16) {
    return args->bits == 8 ? multiply<bf16, 8>(both, stream) : multiply<bf16, 4>(both, stream);
  }
  return args->bits == 8 ? multiply<f16, 8>(both, stream) : multiply<f16, 4>(both, stream);
}
