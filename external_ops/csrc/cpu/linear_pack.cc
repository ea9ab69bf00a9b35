// Lays weights out for cpu/linear.cc. Not level code: it runs once for each model.
#include <omp.h>

#include <cstring>

#include "llama_ops/linear.h"

namespace {

constexpr int64_t kPanel = LLAMA_OPS_LINEAR_PANEL;

int64_t padded(int64_t inputs) {
  return (inputs + LLAMA_OPS_LINEAR_STEP - 1) / LLAMA_OPS_LINEAR_STEP * LLAMA_OPS_LINEAR_STEP;
}

// Inputs in 256 bytes of a panel.
int64_t step_of(int kind) {
  switch (kind) {
    case LLAMA_OPS_LINEAR_F32: return 1;
    case LLAMA_OPS_LINEAR_BF16: return 2;
    case LLAMA_OPS_LINEAR_INT8:
    case LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY: return 4;
    default: return 8;
  }
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
uint32_t half_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Input k of an output as its kind stores it; what a panel is filled up with where there is none.
uint32_t stored(const llama_ops_linear_pack_args& a, int64_t output, int64_t k) {
  const bool there = output < a.outputs && k < a.inputs;
  switch (a.kind) {
    case LLAMA_OPS_LINEAR_F32: return there ? bits_of(a.wide[output * a.inputs + k]) : 0;
    case LLAMA_OPS_LINEAR_BF16: return there ? half_bits(a.wide[output * a.inputs + k]) : 0;
    case LLAMA_OPS_LINEAR_INT8:
    case LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY: {
      const int8_t* from = static_cast<const int8_t*>(a.integers);
      return there ? from[output * a.inputs + k] + 128 : 128;
    }
    default: {
      const uint8_t* from = static_cast<const uint8_t*>(a.integers);
      const int64_t half = a.inputs / 2;
      return there ? from[output * half + k / 2] >> (k % 2 * 4) & 15 : 8;
    }
  }
}

// The four bytes of an output at a step.
uint32_t word(const llama_ops_linear_pack_args& a, int64_t output, int64_t k) {
  const int step = static_cast<int>(step_of(a.kind));
  uint32_t bits = 0;
  for (int j = 0; j < step; ++j) {
    const int shift = step == 8 ? j % 4 * 8 + j / 4 * 4 : j * (32 / step);
    bits |= stored(a, output, k + j) << shift;
  }
  return bits;
}

void pack_scale(const llama_ops_linear_pack_args& a, int64_t panel) {
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t output = panel * kPanel + i, to = (panel * a.groups + group) * kPanel + i;
      const float scale = output < a.outputs ? a.scale[output * a.groups + group] : 0.0f;
      if (a.scale_dtype == LLAMA_OPS_F32) {
        static_cast<float*>(a.packed_scale)[to] = scale;
      } else {
        static_cast<uint16_t*>(a.packed_scale)[to] = static_cast<uint16_t>(half_bits(scale));
      }
    }
  }
}

}  // namespace

int64_t llama_ops_linear_panel_bytes(int kind, int64_t inputs) {
  return padded(inputs) / step_of(kind) * kPanel * 4;
}

void llama_ops_linear_pack(const llama_ops_linear_pack_args* args) {
  const llama_ops_linear_pack_args& a = *args;
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel, step = step_of(a.kind);
  const int64_t bytes = llama_ops_linear_panel_bytes(a.kind, a.inputs);
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel) {
    char* to = static_cast<char*>(a.data) + panel * bytes;
    for (int64_t i = 0; i < kPanel; ++i) {
      for (int64_t k = 0; k < padded(a.inputs); k += step) {
        const uint32_t bits = word(a, panel * kPanel + i, k);
        std::memcpy(to + (k / step * kPanel + i) * 4, &bits, 4);
      }
    }
    if (a.scale != nullptr) pack_scale(a, panel);
  }
}
