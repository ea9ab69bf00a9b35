// Attention over a paged cache; see llama_ops/paged_attention.h.
//
// A tile is some tokens of one sequence; its rows are their queries that share one key head. Keys
// go by in chunks. Each chunk gives a softmax over its own keys (largest score, sum of
// exponentials, weighted values), which is then merged into what the chunks before gave, as in flash
// attention (Dao et al. 2022). As chunks are the same whoever computes them, so are the results.
//
// Scores of many rows lie as [keys, rows]: rows are the lanes of vectors, so that the softmax needs no
// sums across lanes. Few rows, as of a decoded token, read the cache once and are bound by that; keys
// are lanes then.
#include "cpu/paged_attention.h"

#include "cpu/paged_work.h"
#include "cpu/parallel.h"

namespace llama_ops {
namespace LLAMA_OPS_LEVEL {

using namespace paged;
using Args = llama_ops_paged_attention_args;

namespace {

constexpr int kPlanSlot = 4, kTileSlot = 5, kWorkspaceSlot = 7;
constexpr int64_t kMostWorkspace = 64 << 20;

struct Plan {
  const Tile* tiles;
  int64_t count;
  int64_t cost;          // of everything, in rows times keys
  int64_t most_rows;     // of a tile, padded to vectors
  int64_t results;       // numbers that the results of all chunks take
  int64_t tile_results;  // numbers that the results of a tile take, for all heads computed together
};

// What a chunk costs; reading it counts as much as a few rows.
int64_t chunk_cost(const Tile& tile) { return (tile.padded_rows + 8) * tile.chunk; }

// Key heads that are computed together at most.
int64_t together(const Args& a, const Tile& tile) { return tile.rows <= kFew ? a.groups : 1; }

Plan plan_of(const Args& a) {
  Tile* tiles = static_cast<Tile*>(scratch(kPlanSlot, (a.tokens + 1) * sizeof(Tile)));
  const int64_t shared = a.heads / a.groups;
  const int64_t most_tokens = larger<int64_t>(1, kTileRows / shared);
  Plan plan{tiles, 0, 0, 0, 0, 0};
  for (int64_t first = 0; first < a.tokens;) {
    int64_t end = first + 1;
    const int32_t sequence = a.sequence[first];
    if (sequence < 0 || a.position[first] < 0) {
      first = end;
      continue;
    }
    while (end < a.tokens && end - first < most_tokens && a.sequence[end] == sequence &&
           a.position[end] >= a.position[end - 1]) {
      ++end;
    }
    const Tile tile = tile_of(first, end - first, shared, a.position[end - 1] + 1);
    plan.cost += tile.chunks * chunk_cost(tile) * a.groups;
    plan.most_rows = larger(plan.most_rows, padded(tile.rows));
    plan.results += tile.chunks * a.groups * result_size(a, tile);
    plan.tile_results = larger(plan.tile_results, together(a, tile) * result_size(a, tile));
    tiles[plan.count++] = tile;
    first = end;
  }
  return plan;
}

// Deals out pieces of work in order, so that every thread gets about the same cost.
struct Deal {
  int64_t total, threads, done = 0;

  int64_t owner(int64_t cost) {
    const int64_t middle = 2 * done + cost;
    done += cost;
    return smaller(threads - 1, middle * threads / larger<int64_t>(1, 2 * total));
  }
};

// Whether dealing out whole key heads would leave threads idle.
bool uneven(const Args& a, const Plan& plan, int threads) {
  if (threads == 1) return false;
  Deal deal{plan.cost, threads};
  int64_t most = 0, load = 0, last = -1;
  for (int64_t i = 0; i < plan.count; ++i) {
    const int64_t cost = plan.tiles[i].chunks * chunk_cost(plan.tiles[i]);
    for (int64_t group = 0; group < a.groups; ++group) {
      const int64_t owner = deal.owner(cost);
      load = owner == last ? load + cost : cost;
      last = owner;
      most = larger(most, load);
    }
  }
  return most * threads * 8 > plan.cost * 9;
}

int64_t workspace_of(const Args& a, const Plan& plan, int threads) {
  const int64_t bytes = plan.results * static_cast<int64_t>(sizeof(float));
  return bytes <= kMostWorkspace && uneven(a, plan, threads) ? bytes : 0;
}

// Memory of this thread for the work on a tile, and behind it for two results of its heads.
template <class T>
float* memory_for(const Args& a, const Plan& plan) {
  const int64_t size = TileWork<T>::memory_size(a, plan.most_rows) + 2 * plan.tile_results;
  return static_cast<float*>(scratch(kTileSlot, size * static_cast<int64_t>(sizeof(float))));
}

// Calls work(number) with a number of the type that the cache stores.
template <class Work>
void for_stored(const Args& a, const Work& work) {
  switch (a.cache_dtype) {
    case LLAMA_OPS_F32: return work(float{});
    case LLAMA_OPS_BF16: return work(bf16{});
    default: return work(int8_t{});
  }
}

// Attends for key heads from `first` on.
template <class T>
void attend_together(const Args& a, const Plan& plan, const Tile& tile, int64_t first,
                     int64_t count, float* memory) {
  float* behind = memory + TileWork<T>::memory_size(a, plan.most_rows);
  const Results totals(a, tile, behind), parts(a, tile, behind + plan.tile_results);
  TileWork<T> work(a, tile, first, count, plan.most_rows, memory);
  work.load_queries();
  for (int64_t g = 0; g < count; ++g) start(a, tile, totals[g]);
  for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
    work.attend(chunk, parts);
    for (int64_t g = 0; g < count; ++g) merge(a, tile, chunk, parts[g], totals[g]);
  }
  for (int64_t g = 0; g < count; ++g) finish(a, tile, first + g, totals[g]);
}

// Attends for whole key heads.
template <class T>
void attend_heads(const Args& a, const Plan& plan, int thread, int threads) {
  float* memory = memory_for<T>(a, plan);
  Deal deal{plan.cost, threads};
  for (int64_t i = 0; i < plan.count; ++i) {
    const Tile& tile = plan.tiles[i];
    const int64_t most = together(a, tile);
    int64_t owned = 0;  // heads before this one that are still to be computed
    for (int64_t group = 0; group <= a.groups; ++group) {
      const bool mine =
          group < a.groups && deal.owner(tile.chunks * chunk_cost(tile)) == thread;
      if (owned > 0 && (!mine || owned == most)) {
        attend_together<T>(a, plan, tile, group - owned, owned, memory);
        owned = 0;
      }
      owned += mine;
    }
  }
}

// Attends for chunks of keys, whose results are left in the workspace.
template <class T>
void attend_chunks(const Args& a, const Plan& plan, float* results, int thread, int threads) {
  float* memory = memory_for<T>(a, plan);
  Deal deal{plan.cost, threads};
  for (int64_t i = 0; i < plan.count; ++i) {
    const Tile& tile = plan.tiles[i];
    for (int64_t group = 0; group < a.groups; ++group) {
      bool loaded = false;
      TileWork<T> work(a, tile, group, 1, plan.most_rows, memory);
      for (int64_t chunk = 0; chunk < tile.chunks; ++chunk, results += result_size(a, tile)) {
        if (deal.owner(chunk_cost(tile)) != thread) continue;
        if (!loaded) work.load_queries();
        loaded = true;
        work.attend(chunk, Results(a, tile, results));
      }
    }
  }
}

}  // namespace

int64_t paged_attention_workspace(const Args& a, int threads) {
  return workspace_of(a, plan_of(a), threads);
}

void paged_attention_part(const Args& a, void* workspace, int thread, int threads) {
  const Plan plan = plan_of(a);
  float* results = static_cast<float*>(workspace);
  for_stored(a, [&](auto number) {
    using T = decltype(number);
    results == nullptr ? attend_heads<T>(a, plan, thread, threads)
                       : attend_chunks<T>(a, plan, results, thread, threads);
  });
}

void paged_attention_merge_part(const Args& a, void* workspace, int thread, int threads) {
  const Plan plan = plan_of(a);
  float* results = static_cast<float*>(workspace);
  const int64_t bytes = plan.tile_results * static_cast<int64_t>(sizeof(float));
  float* memory = static_cast<float*>(scratch(kTileSlot, bytes));
  int64_t item = 0;
  for (int64_t i = 0; i < plan.count; ++i) {
    const Tile& tile = plan.tiles[i];
    const Result total = Results(a, tile, memory)[0];
    for (int64_t group = 0; group < a.groups; ++group, ++item) {
      const Results parts(a, tile, results);
      results += tile.chunks * parts.size;
      if (item % threads != thread) continue;
      start(a, tile, total);
      for (int64_t chunk = 0; chunk < tile.chunks; ++chunk) {
        merge(a, tile, chunk, parts[chunk], total);
      }
      finish(a, tile, group, total);
    }
  }
}

void cache_write_part(const Args& a, int thread, int threads) {
  const Range tokens = share(a.tokens, 1, thread, threads);
  float* buffer = static_cast<float*>(scratch(kTileSlot, padded(a.dim) * sizeof(float)));
  for_stored(a, [&](auto number) {
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      write_token<decltype(number)>(a, token, buffer);
    }
  });
}

void paged_attention(const Args& a) {
  const Plan plan = plan_of(a);
  const int64_t work = plan.cost * a.dim;
  const int64_t bytes = workspace_of(a, plan, llama_ops_threads_for(work, 0));
  void* workspace = bytes == 0 ? nullptr : scratch(kWorkspaceSlot, bytes);
  on_threads(work, [&](int thread, int threads) {
    cache_write_part(a, thread, threads);
    if (threads > 1) {
#pragma omp barrier
    }
    paged_attention_part(a, workspace, thread, threads);
    if (workspace == nullptr) return;
    if (threads > 1) {
#pragma omp barrier
    }
    paged_attention_merge_part(a, workspace, thread, threads);
  });
}

}  // namespace LLAMA_OPS_LEVEL
}  // namespace llama_ops
