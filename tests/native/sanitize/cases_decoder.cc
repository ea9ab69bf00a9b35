#include <vector>

#include "cases.h"
#include "llama_ops/decoder.h"

using cases::Array;
using cases::Cache;
using cases::kUnwritten;
using cases::Numbers;

namespace {

constexpr int64_t kHidden = 72, kFfn = 104, kHeads = 6, kGroups = 2, kDim = 20, kBlock = 4;
constexpr int64_t kQkv = (kHeads + 2 * kGroups) * kDim;

// A packed weight of random numbers.
struct Weight {
  Weight(int64_t outputs, int64_t inputs, int kind)
      : panels((outputs + 63) / 64),
        wide(kind <= LLAMA_OPS_LINEAR_BF16),
        groups(kind >= LLAMA_OPS_LINEAR_INT4 ? inputs / 8 : 1),
        data(panels * llama_ops_linear_panel_bytes(kind, inputs)),
        scale(wide ? 0 : panels * groups * 64, LLAMA_OPS_BF16),
        bias(outputs, LLAMA_OPS_F32) {
    Numbers numbers(outputs * inputs, LLAMA_OPS_F32), scales(outputs * groups, LLAMA_OPS_F32);
    Array<uint8_t> integers(outputs * inputs, 0x79);
    llama_ops_linear_pack_args pack{};
    pack.wide = wide ? numbers.floats() : nullptr;
    pack.integers = wide ? nullptr : integers.data();
    pack.scale = wide ? nullptr : scales.floats();
    pack.data = data.data();
    pack.packed_scale = scale.data();
    pack.outputs = outputs;
    pack.inputs = inputs;
    pack.groups = groups;
    pack.kind = kind;
    pack.scale_dtype = LLAMA_OPS_BF16;
    llama_ops_linear_pack(&pack);
    packed = {data.data(), wide ? nullptr : scale.data(), outputs, inputs, groups, kind, LLAMA_OPS_BF16};
  }

  int64_t panels;
  bool wide;
  int64_t groups;
  Array<uint8_t> data;
  Numbers scale, bias;
  llama_ops_linear_weight packed;
};

struct Step {
  std::vector<int32_t> sequence, position;
};

void decode(int kind, int cache_dtype, const Step& step) {
  const int64_t tokens = static_cast<int64_t>(step.sequence.size());
  Weight qkv(kQkv, kHidden, kind), o(kHidden, kHeads * kDim, kind);
  Weight gate_up(2 * kFfn, kHidden, kind), down(kHidden, kFfn, kind);
  Numbers norm(kHidden, LLAMA_OPS_F32), frequency(kDim / 2, LLAMA_OPS_F32);
  const int64_t heads = 6 * kBlock * kGroups;
  Cache k_cache(heads, kDim, cache_dtype), v_cache(heads, kDim, cache_dtype);
  llama_ops_decoder_layer layer{norm.floats(),     norm.floats(),      qkv.packed,
                                o.packed,          gate_up.packed,     down.packed,
                                qkv.bias.floats(), nullptr,            gate_up.bias.floats(),
                                down.bias.floats(), k_cache.data(),    v_cache.data()};
  const llama_ops_decoder_layer layers[] = {layer, layer};
  Array<int32_t> table(6);
  for (int i = 0; i < 6; ++i) table[i] = (i * 5 + 2) % 6;
  Array<int32_t> sequence(tokens), position(tokens);
  for (int64_t i = 0; i < tokens; ++i) {
    sequence[i] = step.sequence[i];
    position[i] = step.position[i];
  }
  Numbers x(tokens * kHidden, LLAMA_OPS_F32), out(tokens * kHidden, LLAMA_OPS_F32, kUnwritten);
  llama_ops_decoder_args args{};
  args.x = x.floats();
  args.out = out.floats();
  args.layers = layers;
  args.frequency = frequency.floats();
  args.block_table = table.data();
  args.sequence = sequence.data();
  args.position = position.data();
  args.num_layers = 2;
  args.tokens = tokens;
  args.hidden = kHidden;
  args.ffn = kFfn;
  args.heads = kHeads;
  args.groups = kGroups;
  args.dim = kDim;
  args.block = kBlock;
  args.table_width = 3;
  args.eps = 1e-5f;
  args.cache_dtype = cache_dtype;
  llama_ops_decoder(&args);
  out.require_written();
}

}  // namespace

LLAMA_OPS_CASE(decoder) {
  const Step steps[] = {{{1}, {11}},
                        {{0, 0, 0, 1, -1}, {4, 5, 6, 0, -1}},
                        {{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}},
                        {{}, {}}};
  constexpr int types[] = {LLAMA_OPS_F32, LLAMA_OPS_BF16, LLAMA_OPS_I8};
  for (int kind = LLAMA_OPS_LINEAR_F32; kind <= LLAMA_OPS_LINEAR_INT4_WEIGHT_ONLY; ++kind) {
    for (const Step& step : steps) decode(kind, types[kind % 3], step);
  }
}
