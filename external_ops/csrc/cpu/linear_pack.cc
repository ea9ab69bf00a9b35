// Lays weights out for cpu/linear.cc, and reads outputs back. Not level code: the first runs once for
// each model, the second waits for memory.
#include <omp.h>

#include <cstring>

#include "llama_ops/linear.h"

namespace {

constexpr int64_t kPanel = LLAMA_OPS_LINEAR_PANEL;

int64_t padded(int64_t inputs) {
  return (inputs + LLAMA_OPS_LINEAR_STEP - 1) / LLAMA_OPS_LINEAR_STEP * LLAMA_OPS_LINEAR_STEP;
}

// Inputs in 256 bytes of a panel.
constexpr int step_of(int kind) {
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

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
uint32_t half_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

float number(const llama_ops_linear_pack_args& a, int64_t output, int64_t k) {
  const int64_t at = a.transposed ? k * a.outputs + output : output * a.inputs + k;
  if (a.wide_dtype == LLAMA_OPS_F32) return static_cast<const float*>(a.wide)[at];
  return float_of(uint32_t{static_cast<const uint16_t*>(a.wide)[at]} << 16);
}

// Input k of an output as its kind stores it; what a panel is filled up with where there is none.
template <int kKind>
uint32_t stored(const llama_ops_linear_pack_args& a, int64_t output, int64_t k) {
  const bool there = output < a.outputs && k < a.inputs;
  if constexpr (kKind == LLAMA_OPS_LINEAR_F32) {
    return there ? bits_of(number(a, output, k)) : 0;
  } else if constexpr (kKind == LLAMA_OPS_LINEAR_BF16) {
    return there ? half_bits(number(a, output, k)) : 0;
  } else if constexpr (kKind == LLAMA_OPS_LINEAR_INT8) {
    const int8_t* from = static_cast<const int8_t*>(a.integers);
    return there ? from[output * a.inputs + k] + 128 : 128;
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(a.integers);
    const int64_t half = a.inputs / 2;
    return there ? from[output * half + k / 2] >> (k % 2 * 4) & 15 : 8;
  }
}

// The four bytes of an output at a step.
template <int kKind>
uint32_t word(const llama_ops_linear_pack_args& a, int64_t output, int64_t k) {
  constexpr int kStep = step_of(kKind);
  uint32_t bits = 0;
  for (int j = 0; j < kStep; ++j) {
    const int shift = kStep == 8 ? j % 4 * 8 + j / 4 * 4 : j * (32 / kStep);
    bits |= stored<kKind>(a, output, k + j) << shift;
  }
  return bits;
}

template <int kKind>
void pack_panel(const llama_ops_linear_pack_args& a, int64_t panel, uint32_t* to) {
  constexpr int kStep = step_of(kKind);
  const int64_t first = panel * kPanel, steps = padded(a.inputs) / kStep;
  // In the order in which the source lies.
  if (a.transposed) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t i = 0; i < kPanel; ++i) {
        to[step * kPanel + i] = word<kKind>(a, first + i, step * kStep);
      }
    }
    return;
  }
  for (int64_t i = 0; i < kPanel; ++i) {
    for (int64_t step = 0; step < steps; ++step) {
      to[step * kPanel + i] = word<kKind>(a, first + i, step * kStep);
    }
  }
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

// A scale of an output as a number.
float scale_of(const llama_ops_linear_weight& w, int64_t panel, int64_t group, int64_t i) {
  const int64_t at = (panel * w.groups + group) * kPanel + i;
  if (w.scale_dtype == LLAMA_OPS_F32) return static_cast<const float*>(w.scale)[at];
  return float_of(uint32_t{static_cast<const uint16_t*>(w.scale)[at]} << 16);
}

// Writes the weights of output i of a panel.
template <int kKind>
void read_row(const llama_ops_linear_weight& w, int64_t panel, int64_t i, float* out) {
  constexpr int kStep = step_of(kKind);
  constexpr bool kIntegers = kKind != LLAMA_OPS_LINEAR_F32 && kKind != LLAMA_OPS_LINEAR_BF16;
  const char* data = static_cast<const char*>(w.data);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(
      data + panel * llama_ops_linear_panel_bytes(w.kind, w.inputs));
  const int64_t group_size = w.inputs / w.groups;
  float scale = 1;
  for (int64_t k = 0; k < w.inputs; ++k) {
    if (kIntegers && k % group_size == 0) scale = scale_of(w, panel, k / group_size, i);
    const uint32_t bits = from[k / kStep * kPanel + i];
    const int j = static_cast<int>(k % kStep);
    if constexpr (kKind == LLAMA_OPS_LINEAR_F32) {
      out[k] = float_of(bits);
    } else if constexpr (kKind == LLAMA_OPS_LINEAR_BF16) {
      out[k] = float_of(j == 0 ? bits << 16 : bits & 0xffff0000u);
    } else if constexpr (kKind == LLAMA_OPS_LINEAR_INT8) {
      out[k] = static_cast<float>(static_cast<int>(bits >> (j * 8) & 255) - 128) * scale;
    } else {
      const int shift = j % 4 * 8 + j / 4 * 4;
      out[k] = static_cast<float>(static_cast<int>(bits >> shift & 15) - 8) * scale;
    }
  }
}

}  // namespace

int64_t llama_ops_linear_panel_bytes(int kind, int64_t inputs) {
  return padded(inputs) / step_of(kind) * kPanel * 4;
}

void llama_ops_linear_pack(const llama_ops_linear_pack_args* args) {
  const llama_ops_linear_pack_args& a = *args;
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  const int64_t bytes = llama_ops_linear_panel_bytes(a.kind, a.inputs);
#pragma omp parallel for schedule(dynamic)
  for (int64_t panel = 0; panel < panels; ++panel) {
    uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<char*>(a.data) + panel * bytes);
    switch (a.kind) {
      case LLAMA_OPS_LINEAR_F32: pack_panel<LLAMA_OPS_LINEAR_F32>(a, panel, to); break;
      case LLAMA_OPS_LINEAR_BF16: pack_panel<LLAMA_OPS_LINEAR_BF16>(a, panel, to); break;
      case LLAMA_OPS_LINEAR_INT8:
      case LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY:
        pack_panel<LLAMA_OPS_LINEAR_INT8>(a, panel, to);
        break;
      default: pack_panel<LLAMA_OPS_LINEAR_INT4>(a, panel, to);
    }
    if (a.scale != nullptr) pack_scale(a, panel);
  }
}

void llama_ops_linear_rows(const llama_ops_linear_rows_args* args) {
  const llama_ops_linear_rows_args& a = *args;
#pragma omp parallel for if (a.rows * a.weight.inputs >= 65536)
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t panel = a.ids[row] / kPanel, i = a.ids[row] % kPanel;
    float* out = a.out + row * a.weight.inputs;
    switch (a.weight.kind) {
      case LLAMA_OPS_LINEAR_F32: read_row<LLAMA_OPS_LINEAR_F32>(a.weight, panel, i, out); break;
      case LLAMA_OPS_LINEAR_BF16: read_row<LLAMA_OPS_LINEAR_BF16>(a.weight, panel, i, out); break;
      case LLAMA_OPS_LINEAR_INT8:
      case LLAMA_OPS_LINEAR_INT8_WEIGHT_ONLY:
        read_row<LLAMA_OPS_LINEAR_INT8>(a.weight, panel, i, out);
        break;
      default: read_row<LLAMA_OPS_LINEAR_INT4>(a.weight, panel, i, out);
    }
  }
}
