// How packed weights become float32: one type per kind, with the layout of llama_ops/linear.h.
#pragma once

#include "cpu/simd.h"
#include "llama_ops/linear.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

constexpr int kPanel = LLAMA_OPS_LINEAR_PANEL;
constexpr int kPanelVecs = kPanel / kWidth;

// (bits & mask) | with, one instruction where there is one.
inline BitVec and_or(BitVec bits, uint32_t mask, uint32_t with) {
#if defined(__AVX512F__)
  const __m512i mask_v = _mm512_set1_epi32(mask), with_v = _mm512_set1_epi32(with);
  return (BitVec)_mm512_ternarylogic_epi32((__m512i)bits, mask_v, with_v, 0xea);
#else
  return (bits & mask) | with;
#endif
}

// The unsigned integer in bits SHIFT ... SHIFT + COUNT - 1, less OFFSET. Put into the fraction of
// 2^(23 - SHIFT), whose last bit before the point is then bit SHIFT, it needs no conversion.
template <int SHIFT, int COUNT, int OFFSET>
inline Vec field(BitVec bits) {
  static_assert(SHIFT + COUNT <= 23, "has to fit into the fraction");
  constexpr uint32_t one = static_cast<uint32_t>(127 + 23 - SHIFT) << 23;
  constexpr float base = static_cast<float>(1 << (23 - SHIFT));
  return (Vec)and_or(bits, ((1u << COUNT) - 1) << SHIFT, one) - (base + OFFSET);
}

// Two bytes, the lower ones of `bits`, as integers of 16 bits after a mask and less an offset.
inline BitVec byte_pair(BitVec bits, uint32_t mask, uint32_t offset) {
  typedef int16_t Shorts __attribute__((vector_size(4 * kWidth)));
  const BitVec low = bits & 0xffffu, spread = (low | low << 8) & (mask | mask << 16);
  return (BitVec)((Shorts)spread - static_cast<int16_t>(offset));
}

// Each kind: kInputs inputs in a step of kPanel times four bytes; input<J> widens one of them; kIntegers,
// which have scales, and pair<J>, inputs 2 J and 2 J + 1 in 16 bits each.
struct WideWeights {
  static constexpr int kInputs = 1;
  static constexpr bool kIntegers = false;
  template <int J>
  static inline Vec input(BitVec bits) { return (Vec)bits; }
};

struct Bf16Weights {
  static constexpr int kInputs = 2;
  static constexpr bool kIntegers = false;
  template <int J>
  static inline Vec input(BitVec bits) { return (Vec)(J == 0 ? bits << 16 : bits & 0xffff0000u); }
};

struct Int8Weights {
  static constexpr int kInputs = 4;
  static constexpr bool kIntegers = true;
  template <int J>
  static inline Vec input(BitVec bits) {
    return field<J % 2 * 8, 8, 128>(J < 2 ? bits : bits >> 16);
  }
  template <int J>
  static inline BitVec pair(BitVec bits) { return byte_pair(J == 0 ? bits : bits >> 16, 255, 128); }
};

struct Int4Weights {
  static constexpr int kInputs = 8;
  static constexpr bool kIntegers = true;
  template <int J>
  static inline Vec input(BitVec bits) {
    return field<J % 2 * 8 + J / 4 * 4, 4, 8>(J % 4 < 2 ? bits : bits >> 16);
  }
  template <int J>
  static inline BitVec pair(BitVec bits) {
    return byte_pair((J % 2 == 0 ? bits : bits >> 16) >> (J < 2 ? 0 : 4), 15, 8);
  }
};

inline BitVec load_bits(const uint8_t* from) {
  BitVec bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

// Scales of a group's outputs, from output `first` of the panel on.
inline Vec load_scale(const llama_ops_linear_weight& w, int64_t panel, int64_t group, int first) {
  const int64_t at = (panel * w.groups + group) * kPanel + first;
  return w.scale_dtype == LLAMA_OPS_F32 ? load(static_cast<const float*>(w.scale) + at)
                                        : load(static_cast<const bf16*>(w.scale) + at);
}

inline bool rounds_rows(int kind) {
  return kind == LLAMA_OPS_LINEAR_INT8 || kind == LLAMA_OPS_LINEAR_INT4;
}

inline int64_t padded(int64_t inputs) {
  return (inputs + LLAMA_OPS_LINEAR_STEP - 1) / LLAMA_OPS_LINEAR_STEP * LLAMA_OPS_LINEAR_STEP;
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
