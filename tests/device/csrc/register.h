// What the rehearsal device adds to Paddle's table of kernels.
#pragma once

#include <initializer_list>

#include "paddle/phi/core/kernel_factory.h"
#include "paddle/phi/core/kernel_registry.h"

namespace rehearsal {

// bfloat16 and float16 of operators that every device has.
void add_half_kernels();
void add_half_adamw();
// Operators that do not, or not well, fall back to CPUs.
void add_own_kernels();
// Operators that only GPUs have, with the checks of their CUDA kernels.
void add_gpu_attention();
void add_gpu_norm();
void add_gpu_blocks();
void add_gpu_fused();
void add_gpu_fp8();

// The device's own backend, for kernels that change their inputs in place.
phi::Backend own_backend();

// Enter a kernel, replacing one for the same types.
template <class Function>
void put_kernel(const char* name, phi::Backend backend, Function function, phi::KernelFn compute,
                std::initializer_list<phi::DataType> types) {
  auto& kernels = phi::KernelFactory::Instance().kernels()[name];
  for (phi::DataType type : types) {
    const phi::KernelKey key(backend, phi::DataLayout::ALL_LAYOUT, type);
    phi::Kernel made(compute, reinterpret_cast<void*>(function));
    phi::KernelArgsParseFunctor<Function>::Parse(key, made.mutable_args_def());
    kernels.erase(key);
    kernels.insert({key, made});
  }
}

#define PUT_KERNEL(NAME, BACKEND, FUNCTION, ...)                                                 \
  rehearsal::put_kernel(NAME, BACKEND, &FUNCTION,                                                \
                        &phi::KernelImpl<decltype(&FUNCTION), &FUNCTION>::Compute, {__VA_ARGS__})

}  // namespace rehearsal
