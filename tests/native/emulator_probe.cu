// Small kernels that show what the emulator does: fragments by the PTX ISA's own formulas, and
// mistakes that it has to notice. On a GPU the first two check the hardware against the same formulas.
#include "laboratory/cuda/mma.cuh"

using namespace llama_ops::cuda;

namespace {

struct MmaArgs {
  const bf16* a;  // [16, 16]
  const bf16* b;  // [16, 8]
  float* c;       // [16, 8]
};

// PTX ISA 9.0, 9.7.14.5.8, "Matrix fragments for mma.m16n8k16 with floating point type": elements a0
// to a7, b0 to b3 and c0 to c3 of a thread, in the section's own formulas.
__global__ void mma_kernel(MmaArgs args) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  bf16 a[8], b[4];
  for (int i = 0; i < 8; ++i) {
    const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
    const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    a[i] = args.a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    b[i] = args.b[row * 8 + group];
  }
  uint32_t a_registers[4], b_registers[2];
  for (int r = 0; r < 4; ++r) a_registers[r] = pack<bf16>(widen(a[2 * r]), widen(a[2 * r + 1]));
  for (int r = 0; r < 2; ++r) b_registers[r] = pack<bf16>(widen(b[2 * r]), widen(b[2 * r + 1]));
  float c[4] = {};
  mma(c, a_registers, b_registers[0], b_registers[1], bf16{});
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    args.c[row * 8 + column] = c[i];
  }
}

struct MatricesArgs {
  const uint16_t* from;  // [4, 8, 8]
  uint32_t* out;         // [2, 4, 32]: plain and transposed, register, lane
};

__global__ void matrices_kernel(MatricesArgs args) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = threadIdx.x; i < 4 * 64; i += kWarp) shared[i] = args.from[i];
  __syncthreads();
  uint32_t plain[4], transposed[4];
  load_matrices(plain, shared + 8 * threadIdx.x);
  load_matrices_transposed(transposed, shared + 8 * threadIdx.x);
  for (int r = 0; r < 4; ++r) {
    args.out[r * kWarp + threadIdx.x] = plain[r];
    args.out[(4 + r) * kWarp + threadIdx.x] = transposed[r];
  }
}

struct MistakeArgs {
  int* out;  // [64]
  int mistake;
};

enum { kNone, kNoBarrier, kNoWait, kDivergent, kPastTheEnd };

// Passes numbers to the neighbour in the next warp through shared memory; `mistake` says what it
// forgets or does wrong.
__global__ void mistake_kernel(MistakeArgs args) {
  alignas(16) static const int numbers[4] = {1, 2, 3, 4};
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  copy_async(shared + 64 + 4 * threadIdx.x, numbers, true);
  commit_copies();
  if (args.mistake != kNoWait) wait_copies<0>();
  if (args.mistake != kNoBarrier) __syncthreads();
  const int neighbour = (threadIdx.x + kWarp) % 64;
  args.out[threadIdx.x] = shared[neighbour] + shared[64 + 4 * neighbour + 3];
  if (args.mistake == kNoWait) wait_copies<0>();
  if (args.mistake == kDivergent && threadIdx.x % 2) __syncwarp();
  if (args.mistake == kPastTheEnd) shared[64 + 4 * 64] = 0;
}

}  // namespace

extern "C" int probe_mma(const void* a, const void* b, float* c, void* stream) {
  const MmaArgs args{static_cast<const bf16*>(a), static_cast<const bf16*>(b), c};
  return launch(mma_kernel, dim3(1), kWarp, 0, stream, args);
}

extern "C" int probe_matrices(const uint16_t* from, uint32_t* out, void* stream) {
  return launch(matrices_kernel, dim3(1), kWarp, 4 * 64 * 2, stream, MatricesArgs{from, out});
}

extern "C" int probe_mistake(int* out, int mistake) {
  return launch(mistake_kernel, dim3(1), 64, 5 * 64 * 4, nullptr, MistakeArgs{out, mistake});
}

// Sizes of the argument structures, in the order of cuda_interface.py.
extern "C" void probe_sizes(int64_t* sizes) {
  const int64_t all[] = {
      sizeof(llama_ops_rms_norm_forward_args),       sizeof(llama_ops_rms_norm_backward_args),
      sizeof(llama_ops_rotary_args),                 sizeof(llama_ops_flash_attention_forward_args),
      sizeof(llama_ops_flash_attention_backward_args), sizeof(llama_ops_cuda_linear_args)};
  for (int64_t size : all) *sizes++ = size;
}
