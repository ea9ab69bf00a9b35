// Runs CUDA kernels on the CPU, so that their indices, masks, fragment layouts and numerics can be
// tested where no GPU is. Included ahead of a .cu file that g++ compiles as C++:
//
//   g++ -std=c++17 -x c++ -include tests/native/cuda_emulator.h -Iexternal_ops/csrc ... file.cu
//
// Blocks run one after another. Each thread of a block is a fiber of its own; a fiber runs until it
// meets a barrier or an instruction of the whole warp, and which fiber runs next is drawn at random
// (emulator_seed), so that a kernel that relies on an order which no barrier demands is likely to
// give a wrong result for some seed. It is no race detector: between two such points a fiber is
// never interrupted. What it reports as an error ends the process with a message: lanes of a warp
// meeting different instructions, threads that leave while others wait, addresses that are not
// aligned, writes past the end of shared memory, copies still under way at the end.
//
// Shared memory starts as NaN in every block. An asynchronous copy lands either at once or when it
// is waited for, drawn at random: code that relies on neither is right.
#pragma once

#define LLAMA_OPS_CUDA_EMULATOR

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_emulator: %s (block %u,%u,%u thread %u)\n", what, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x);
  abort();
}

struct Random {
  uint64_t state = 1;
  uint32_t operator()() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
};
inline Random random_number;

constexpr size_t kStack = 64 << 10, kGuard = 256, kWarpSize = 32;

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf state;
  bool fresh, finished;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

// Threads that wait for one another: a warp at an instruction of all its lanes, or a block.
struct Meeting {
  const char* what = nullptr;
  std::vector<unsigned> waiting;
  std::vector<void*> operands;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  std::vector<Meeting> warps;
  Meeting block;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned running = 0, left = 0;
  ucontext_t scheduler_start;
  jmp_buf scheduler;
  int64_t conflicts = 0;  // shared memory accesses beyond the least that ldmatrix needs
};
inline Machine machine;

inline unsigned char* shared_memory() { return machine.shared_begin; }

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("an address is not aligned");
}

inline void suspend() {
  if (_setjmp(machine.fibers[machine.running].state) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_fiber() {
  (*machine.body)();
  Fiber& fiber = machine.fibers[machine.running];
  if (!fiber.open.empty() || !fiber.groups.empty()) fail("a thread ends with copies under way");
  fiber.finished = true;
  --machine.left;
  _longjmp(machine.scheduler, 1);
}

// Waits until `size` threads have come; the last one calls act on the operands of all.
template <class Act>
void meet(Meeting& meeting, const char* what, size_t size, void* operand, const Act& act) {
  if (meeting.waiting.empty()) meeting.what = what;
  if (strcmp(meeting.what, what)) fail("threads that belong together meet different instructions");
  meeting.waiting.push_back(machine.running);
  meeting.operands.push_back(operand);
  if (meeting.waiting.size() < size) return suspend();
  std::vector<void*> by_lane(size);
  for (size_t i = 0; i < size; ++i) by_lane[meeting.waiting[i] % size] = meeting.operands[i];
  act(by_lane);
  for (unsigned thread : meeting.waiting) machine.ready.push_back(thread);
  meeting.waiting.clear();
  meeting.operands.clear();
  suspend();
}

template <class Act>
void meet_warp(const char* what, void* operand, const Act& act) {
  meet(machine.warps[machine.running / kWarpSize], what, kWarpSize, operand, act);
}

// Runs ready fibers, drawn at random, until all threads of the block have ended.
inline void run_block(unsigned threads) {
  machine.ready.clear();
  machine.warps.assign(threads / kWarpSize, Meeting{});
  machine.block = Meeting{};
  machine.left = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.fresh = true;
    fiber.finished = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    machine.ready.push_back(i);
  }
  while (machine.left > 0) {
    if (machine.ready.empty()) fail("threads wait for others that have left or wait elsewhere");
    const size_t pick = random_number() % machine.ready.size();
    machine.running = machine.ready[pick];
    machine.ready[pick] = machine.ready.back();
    machine.ready.pop_back();
    threadIdx = {machine.running, 0, 0};
    if (_setjmp(machine.scheduler) != 0) continue;
    Fiber& fiber = machine.fibers[machine.running];
    if (!fiber.fresh) _longjmp(fiber.state, 1);
    fiber.fresh = false;
    setcontext(&fiber.start);
  }
}

inline int launch(const std::function<void()>& body, dim3 grid, int block, int64_t shared) {
  if (block % kWarpSize || block > 1024) fail("blocks have to be whole warps, 1024 threads at most");
  if (shared > (160 << 10)) return -1;  // what sm_80 has, less what it keeps
  if (machine.fibers.size() < static_cast<size_t>(block)) machine.fibers.resize(block);
  machine.shared.resize(shared + 128 + kGuard);
  machine.shared_begin = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(machine.shared.data()) + 127) / 128 * 128);
  machine.body = &body;
  gridDim = grid;
  blockDim = dim3(block);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        memset(machine.shared.data(), 0xff, machine.shared.size());
        run_block(block);
        for (const unsigned char* byte = machine.shared_begin + shared;
             byte < machine.shared_begin + shared + 128; ++byte) {
          if (*byte != 0xff) fail("a write past the end of shared memory");
        }
      }
    }
  }
  return 0;
}

}  // namespace emulator

// The seed of schedules, and how many shared memory accesses conflicted since the last call.
extern "C" inline __attribute__((used)) void emulator_seed(uint64_t seed) {
  emulator::random_number.state = seed * 0x9e3779b97f4a7c15ull + 1;
}
extern "C" inline __attribute__((used)) int64_t emulator_conflicts() {
  const int64_t conflicts = emulator::machine.conflicts;
  emulator::machine.conflicts = 0;
  return conflicts;
}

inline void __syncthreads() {
  emulator::meet(emulator::machine.block, "__syncthreads", blockDim.x, nullptr,
                 [](const std::vector<void*>&) {});
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  emulator::meet_warp("__syncwarp", nullptr, [](const std::vector<void*>&) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) emulator::fail("only whole warps are emulated");
  struct Operand {
    T value, result;
    int distance;
  } mine{value, T{}, distance};
  emulator::meet_warp("shfl_xor", &mine, [](const std::vector<void*>& all) {
    for (size_t lane = 0; lane < all.size(); ++lane) {
      Operand& one = *static_cast<Operand*>(all[lane]);
      one.result = static_cast<Operand*>(all[lane ^ one.distance])->value;
    }
  });
  return mine.result;
}

inline int __any_sync(unsigned mask, int predicate) {
  if (mask != 0xffffffffu) emulator::fail("only whole warps are emulated");
  int mine = predicate;
  emulator::meet_warp("any", &mine, [](const std::vector<void*>& all) {
    int any = 0;
    for (void* one : all) any |= *static_cast<int*>(one) != 0;
    for (void* one : all) *static_cast<int*>(one) = any;
  });
  return mine;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = (static_cast<uint64_t>(high) << 32) | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const int which = (selector >> (4 * i)) & 7;
    out |= static_cast<uint32_t>((both >> (8 * which)) & 0xff) << (8 * i);
  }
  return out;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace llama_ops {
namespace cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

}  // namespace cuda
}  // namespace llama_ops

inline float __bfloat162float(llama_ops::cuda::bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline llama_ops::cuda::bf16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(llama_ops::cuda::f16 x) { return static_cast<float>(x.value); }
inline llama_ops::cuda::f16 __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

namespace llama_ops {
namespace cuda {

template <class T>
uint32_t pack(float first, float second);
template <>
inline uint32_t pack<bf16>(float first, float second) {
  return __float2bfloat16_rn(first).bits |
         static_cast<uint32_t>(__float2bfloat16_rn(second).bits) << 16;
}
template <>
inline uint32_t pack<f16>(float first, float second) {
  const f16 both[2] = {__float2half_rn(first), __float2half_rn(second)};
  uint32_t out;
  memcpy(&out, both, 4);
  return out;
}

// Half 0 or 1 of a register.
inline float half_of(uint32_t pair, int half, bf16) {
  return __bfloat162float({static_cast<uint16_t>(pair >> (16 * half))});
}
inline float half_of(uint32_t pair, int half, f16) {
  f16 both[2];
  memcpy(both, &pair, 4);
  return __half2float(both[half]);
}

template <class T>
uint32_t add_pair(uint32_t a, uint32_t b, T t) {
  return pack<T>(half_of(a, 0, t) + half_of(b, 0, t), half_of(a, 1, t) + half_of(b, 1, t));
}
template <class T>
uint32_t multiply_pair(uint32_t a, uint32_t b, T t) {
  return pack<T>(half_of(a, 0, t) * half_of(b, 0, t), half_of(a, 1, t) * half_of(b, 1, t));
}

// The product by the fragments' documented element positions (mma.cuh names the source).
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T t) {
  struct Operand {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulator::meet_warp("mma", &mine, [t](const std::vector<void*>& all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& one = *static_cast<Operand*>(all[lane]);
      const int group = lane / 4, member = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          a[group + 8 * (r % 2)][2 * member + half + 8 * (r / 2)] = half_of(one.a[r], half, t);
        }
        for (int r = 0; r < 2; ++r) b[2 * member + half + 8 * r][group] = half_of(one.b[r], half, t);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Operand& one = *static_cast<Operand*>(all[lane]);
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
        for (int k = 0; k < 16; ++k) one.c[r] += a[row][k] * b[k][column];
      }
    }
  });
}

inline void load_matrices_either(uint32_t (&out)[4], const void* row, bool transposed) {
  emulator::check_alignment(row, 16);
  struct Operand {
    uint32_t* out;
    const uint16_t* row;
    bool transposed;
  } mine{out, static_cast<const uint16_t*>(row), transposed};
  emulator::meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", &mine,
                      [](const std::vector<void*>& all) {
    const auto row_of = [&](int matrix, int i) {
      return static_cast<Operand*>(all[8 * matrix + i])->row;
    };
    for (int matrix = 0; matrix < 4; ++matrix) {
      int bank_uses[8] = {}, most = 0;
      for (int i = 0; i < 8; ++i) {
        const int uses = ++bank_uses[reinterpret_cast<uintptr_t>(row_of(matrix, i)) / 16 % 8];
        most = uses > most ? uses : most;
      }
      emulator::machine.conflicts += most - 1;
      for (int lane = 0; lane < 32; ++lane) {
        const Operand& one = *static_cast<Operand*>(all[lane]);
        const int group = lane / 4, member = lane % 4;
        uint32_t halves[2];
        for (int half = 0; half < 2; ++half) {
          halves[half] = one.transposed ? row_of(matrix, 2 * member + half)[group]
                                        : row_of(matrix, group)[2 * member + half];
        }
        one.out[matrix] = halves[0] | halves[1] << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  load_matrices_either(out, row, false);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  load_matrices_either(out, row, true);
}

inline void land(const emulator::Copy& copy) {
  if (copy.from == nullptr) {
    memset(copy.to, 0, 16);
  } else {
    memcpy(copy.to, copy.from, 16);
  }
}
inline void copy_async(void* to, const void* from, bool valid) {
  emulator::check_alignment(to, 16);
  emulator::check_alignment(from, 16);
  const emulator::Copy copy{to, valid ? from : nullptr};
  if (emulator::random_number() % 2) return land(copy);
  emulator::machine.fibers[emulator::machine.running].open.push_back(copy);
}
inline void commit_copies() {
  emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.running];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void wait_copies() {
  emulator::Fiber& fiber = emulator::machine.fibers[emulator::machine.running];
  while (fiber.groups.size() > kPending) {
    for (const emulator::Copy& copy : fiber.groups.front()) land(copy);
    fiber.groups.erase(fiber.groups.begin());
  }
}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

}  // namespace cuda
}  // namespace llama_ops
