// Tensor core products and the copies that feed them: all of the suite's PTX (sm_80 and newer).
//
// Element positions are those of the PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16 with floating
// point type" and "Warp-level Matrix Load Instruction: ldmatrix". With group = lane / 4 and
// member = lane % 4, register r of a fragment holds, lower half first:
//   A (16 x 16): row group + 8 * (r % 2),  columns 2 * member + {0, 1} + 8 * (r / 2)
//   B (16 x 8):  rows 2 * member + {0, 1} + 8 * r,  column group
//   C (16 x 8):  row group + 8 * (r / 2),  column 2 * member + r % 2, one float32 a register
// The A fragment of a product thus takes two neighbouring C fragments of the product before it,
// rounded and packed, without any exchange between lanes.
#pragma once

#include "laboratory/cuda/numbers.cuh"

namespace llama_ops {
namespace cuda {

#ifndef LLAMA_OPS_CUDA_EMULATOR

// c += a * b with float32 sums.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8 * m + i gives the address of row i
// of matrix m (16 bytes, 16-byte aligned); register m then holds row group, columns 2 * member and
// 2 * member + 1 of matrix m.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: register m holds rows 2 * member and 2 * member + 1 of column
// group.
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Starts copying 16 bytes from global to shared memory; zeros instead where `valid` is false, and
// `from` is not read then.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of copies of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending latest groups of this thread are under way. Other threads see the
// data after a barrier.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2 to the power x, with results too small for a normal number as 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif  // LLAMA_OPS_CUDA_EMULATOR

}  // namespace cuda
}  // namespace llama_ops
