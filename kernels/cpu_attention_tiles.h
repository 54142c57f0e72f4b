// Attention on AMX (cpu_tiles.h), over work items of prefill and of decode alike: bfloat16 products, softmax in float32.
//
// Scores are made transposed, S^T = K Q^T, so that keys are the first operand straight from their pages. Then 16 queries lie
// side by side in a row of scores, and the softmax runs down the rows without sums across a vector. Of weights, rounded to
// bfloat16, two neighbouring rows make pairs, which turned are the first operand of O = P V; values only have to be paired, once
// for all queries of an item.
//
// Blocks of keys and the tokens of a product lie at multiples of their sizes, and a key that a query does not see adds zero:
// so a query's result does not depend on which others are in its item.

#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu_attention.h"
#include "cpu_tile_transpose.h"

namespace {

constexpr int64_t kBlockTokens = 128;
constexpr int64_t kStepTokens = 32;  // that one product of tiles sums over
constexpr int64_t kSteps = kBlockTokens / kStepTokens;
constexpr int64_t kStepDims = 32;
constexpr float kLog2E = 1.44269504f;

// ---- One item for some KV heads.

// Rows of a sequence and the run of keys that they meet; a query is one head of one row. Where few queries would leave a tile
// half empty, those of several KV heads lie in it, as if their keys were one, as long as all together: each query is zero but
// for its own head's dimensions.
struct HeadItem {
  const Inputs<BFloat16>& in;
  int64_t sequence, row, num_rows, kv_head, num_kv_heads;
  int64_t position;    // of the first row
  int64_t first, end;  // keys

  // Of a key or a value.
  int64_t width() const { return num_kv_heads * in.shape.dim; }
  int64_t queries_of_row() const { return num_kv_heads * in.shape.group; }
  int64_t num_queries() const { return num_rows * queries_of_row(); }
  int64_t num_tiles() const { return (num_queries() + kTileRows - 1) / kTileRows; }
  // Queries that fill the last tile are at the last row's.
  int64_t position_of(int64_t query) const { return position + std::min(query / queries_of_row(), num_rows - 1); }
  int64_t row_of(int64_t query) const { return row + query / queries_of_row(); }
  int64_t head_of(int64_t query) const { return kv_head * in.shape.group + query % queries_of_row(); }
  // Where its own dimensions begin, of all in `width`.
  int64_t dims_of(int64_t query) const { return query % queries_of_row() / in.shape.group * in.shape.dim; }
  // Where a query begins, and what comes of it.
  int64_t place_of(int64_t query) const { return (row_of(query) * in.shape.heads + head_of(query)) * in.shape.dim; }
  // Where the keys and the values of a token begin; those of its page follow in strides.
  int64_t token_place(int64_t token) const {
    const Shape& s = in.shape;
    const int64_t page = in.layer_page + in.tables[sequence * s.table_stride + token / s.page_size];
    return ((page * s.page_size + token % s.page_size) * s.kv_heads + kv_head) * s.dim;
  }
  int64_t stride() const { return in.shape.kv_heads * in.shape.dim; }
  // The first key that a query at a position sees.
  int64_t first_of(int64_t position) const { return std::max(first, in.first_key(position)); }
};

template <typename T>
constexpr bool kMultipliesTiles = kHasTiles && std::is_same_v<T, BFloat16>;

// Whether products of tiles serve a model: a tile of keys lies in one page.
inline bool fits_tiles(const Shape& shape) {
  return shape.dim % kStepDims == 0 && shape.page_size % kTileRows == 0;
}

// What a thread has of the item at hand.
struct HeadState {
  std::vector<Tile> queries;         // of each tile of 16: [width / 32], 16 pairs of dimensions x 16 queries
  std::vector<float> values;         // of a block: [pairs of tokens, width] pairs
  std::vector<Tile> outputs;         // of each tile of queries: [width / 16], 16 queries x 16 dimensions
  std::vector<BFloat16> nothing;     // [width]: what is read in place of values that are not met
  // Of each query: the greatest score, in units of the logarithm of 2, and the sum of weights relative to it.
  std::vector<float> tops, totals;
};

// sinks: of all heads, whose queries have seen them before all keys; null: none.
inline void begin_item(const HeadItem& item, const float* sinks, HeadState& state) {
  const int64_t dim = item.in.shape.dim, width = item.width(), tiles = item.num_tiles();
  state.queries.assign(tiles * width / kStepDims, Tile{});
  state.values.resize(kBlockTokens / 2 * width);
  state.outputs.assign(tiles * width / kTileRows, Tile{});
  state.tops.assign(tiles * kTileRows, kUnseen);
  state.totals.assign(tiles * kTileRows, 0.0f);
  for (int64_t query = 0; query < item.num_queries(); ++query) {
    const BFloat16* from = item.in.q + item.place_of(query);
    Tile* tiles_of_query = state.queries.data() + (query / kTileRows * width + item.dims_of(query)) / kStepDims;
    for (int64_t d = 0; d < dim; d += kStepDims)
      std::memcpy(tiles_of_query[d / kStepDims].bits[query % kTileRows], from + d, kRowBytes);
    if (sinks == nullptr) continue;
    state.tops[query] = sinks[item.head_of(query)] * kLog2E;
    state.totals[query] = 1;
  }
  for (Tile& tile : state.queries) transpose(tile);
}

// 32 tokens from a multiple of 32 on, to the second cache, past the first.
inline void prefetch_tokens(const HeadItem& item, const BFloat16* pages, int64_t begin) {
  for (int64_t token = begin; token < std::min(begin + kStepTokens, item.end); token += kTileRows) {
    const char* from = reinterpret_cast<const char*>(pages + item.token_place(token));
    for (int64_t i = 0; i < kTileRows; ++i, from += item.stride() * sizeof(BFloat16))
      for (int64_t byte = 0; byte < item.width() * int64_t{sizeof(BFloat16)}; byte += 64)
        __builtin_prefetch(from + byte, 0, 2);
  }
}

// scores: 16 tokens x 16 queries each, of the tokens from `begin`, a multiple of 32, to `end`. is_first: no queries before
// these have met the keys, which come from memory.
inline void score_keys(const HeadItem& item, const Tile* queries, int64_t begin, int64_t end, bool is_first, Tile* scores) {
  const int64_t row_bytes = item.stride() * sizeof(BFloat16);
  for (int64_t t = begin; t < end; t += kStepTokens, scores += 2) {
    const BFloat16* keys = item.in.k_pages + item.token_place(t);
    const BFloat16* next = t + kTileRows < end ? item.in.k_pages + item.token_place(t + kTileRows) : keys;
    if (is_first) prefetch_tokens(item, item.in.k_pages, t + kStepTokens);
    clear_tile<0>();
    clear_tile<1>();
    for (int64_t d = 0; d < item.width(); d += kStepDims) {
      load_tile<2>(queries + d / kStepDims, kRowBytes);
      load_tile<3>(keys + d, row_bytes);
      multiply_tiles<0, 3, 2>();
      load_tile<4>(next + d, row_bytes);
      multiply_tiles<1, 4, 2>();
    }
    store_tile<0>(scores, kRowBytes);
    store_tile<1>(scores + 1, kRowBytes);
  }
}

// The values of tokens `begin`, a multiple of 32, to `end`, into state.values, in the block from `block` on. Those that the
// item does not meet are zero, whatever lies there: a weight of zero would make NaN of NaN.
inline void pair_values(const HeadItem& item, int64_t block, int64_t begin, int64_t end, HeadState& state) {
  const int64_t width = item.width();
  state.nothing.resize(width);
  prefetch_tokens(item, item.in.v_pages, begin);
  for (int64_t t = begin; t < end; t += kStepTokens) {
    prefetch_tokens(item, item.in.v_pages, t + kStepTokens);
    const BFloat16* tokens[kStepTokens];
    for (int64_t i = 0; i < kStepTokens; ++i) {
      if (t + i < item.first || t + i >= item.end) {
        tokens[i] = state.nothing.data();
      } else {  // those of a tile lie in one page
        const bool follows = i % kTileRows > 0 && t + i > item.first;
        tokens[i] = follows ? tokens[i - 1] + item.stride() : item.in.v_pages + item.token_place(t + i);
      }
    }
    float* pairs = state.values.data() + (t - block) / 2 * width;
    for (int64_t pair = 0; pair < kTileDepth; ++pair, pairs += width)
      for (int64_t d = 0; d < width; d += kLanes)
        store(pairs + d, (Vec)((Bits)load(tokens[2 * pair] + d) >> 16 | (Bits)load(tokens[2 * pair + 1] + d)));
  }
}

inline void scale(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) * factor);
}

// 2 to the power of x, for x <= 0, to 4 millionths, and 1 for 0: of a weight, bfloat16 keeps thousandths. The polynomial has the least
// relative error for exponents from -1/2 to 1/2, by least squares at Chebyshev's points.
inline Vec exp2_of_negative(Vec x) {
#ifdef __AVX512F__
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x < -126.0f ? splat(-126.0f) : x;
  const Ints n = __builtin_convertvector(x - 0.5f, Ints);  // towards zero, so to the nearest
  const Vec whole = __builtin_convertvector(n, Vec);
#endif
  const Vec r = x - whole;
  Vec p = splat(9.6004e-3f);
  for (const float c : {5.591689e-2f, 2.4023718e-1f, 6.9312199e-1f, 1.0f}) p = p * r + c;
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return (Vec)((Ints)p + (n << 23));
#endif
}

// The keys that some queries see: kLanes of them from `query` on.
struct Sight {
  Ints first, end;

  Sight(const HeadItem& item, int64_t query) {
    for (int i = 0; i < kLanes; ++i) {
      const int64_t position = item.position_of(query + i);
      first[i] = item.first_of(position);
      end[i] = std::min(position + 1, item.end);
    }
  }
};

// Scores of kLanes queries, side by side from `lane` on, for the tokens from `begin`, a multiple of 32, to `end`, become
// weights relative to the greatest score so far: [token pairs, 16, 2] bfloat16 in `weights`, zero up to the next multiple of
// 32. Without `sight` they see all. Returns by what earlier weights have shrunk.
inline Vec weigh(const HeadItem& item, const Sight* sight, int64_t begin, int64_t end, int64_t lane, Tile* scores,
                 Tile* weights, float* top, float* total) {
  const auto row = [lane](Tile* tiles, int64_t i) { return tiles[i / kTileRows].row(i % kTileRows) + lane; };
  const Vec before = load(top);
  Vec best = before;
  for (int64_t t = begin; t < end; ++t) {
    float* place = row(scores, t - begin);
    Vec score = load(place) * splat(item.in.softcap > 0 ? item.in.scale : item.in.scale * kLog2E);
    if (item.in.softcap > 0) score = soft_cap(score, item.in.softcap) * kLog2E;
    if (sight != nullptr) {
      const Ints token = (int32_t)t - Ints{};
      score = (token >= sight->first) & (token < sight->end) ? score : splat(kUnseen);
    }
    store(place, score);
    best = max_of(best, score);
  }
  Vec sum = {};
  const auto weight = [&](int64_t t) {
    if (t >= end) return Vec{};
    const Vec score = load(row(scores, t - begin));
    const Vec e = score > kUnseen ? exp2_of_negative(score - best) : Vec{};
    sum += e;
    return e;
  };
  for (int64_t t = begin; t < (end + kStepTokens - 1) / kStepTokens * kStepTokens; t += 2) {
    const Bits even = (Bits)weight(t) + 0x8000, odd = (Bits)weight(t + 1) + 0x8000;  // to the nearest
    store(row(weights, (t - begin) / 2), (Vec)(even >> 16 | (odd & 0xffff0000u)));
  }
  const Vec decay = exp2_of_negative(before - best);
  store(top, best);
  store(total, load(total) * decay + sum);
  return decay;
}

// outputs[kCount] += weights[num_steps] times as many tiles of values, [32 tokens / 2, width] pairs a step.
template <int kCount>
inline void add_values(const float* values, int64_t width, const Tile* weights, int64_t num_steps, Tile* outputs) {
  const int64_t row_bytes = width * sizeof(float);
  load_tile<0>(outputs, kRowBytes);
  load_tile<1>(outputs + 1, kRowBytes);
  if constexpr (kCount == 4) {
    load_tile<2>(outputs + 2, kRowBytes);
    load_tile<3>(outputs + 3, kRowBytes);
  }
  for (int64_t step = 0; step < num_steps; ++step, values += kTileDepth * width) {
    load_tile<4>(weights + step, kRowBytes);
    load_tile<5>(values, row_bytes);
    multiply_tiles<0, 4, 5>();
    load_tile<6>(values + kTileRows, row_bytes);
    multiply_tiles<1, 4, 6>();
    if constexpr (kCount == 4) {
      load_tile<7>(values + 2 * kTileRows, row_bytes);
      multiply_tiles<2, 4, 7>();
      load_tile<5>(values + 3 * kTileRows, row_bytes);
      multiply_tiles<3, 4, 5>();
    }
  }
  store_tile<0>(outputs, kRowBytes);
  store_tile<1>(outputs + 1, kRowBytes);
  if constexpr (kCount == 4) {
    store_tile<2>(outputs + 2, kRowBytes);
    store_tile<3>(outputs + 3, kRowBytes);
  }
}

// One tile of queries meets the keys from `begin`, in the block from `block` on, to `end`.
inline void meet_keys(const HeadItem& item, int64_t tile, int64_t block, int64_t begin, int64_t end, Tile* scores,
                      HeadState& state) {
  const int64_t query = tile * kTileRows, num_outputs = item.width() / kTileRows;
  Tile* const outputs = state.outputs.data() + tile * num_outputs;
  Tile weights[kSteps];
  const int64_t last = item.position_of(query + kTileRows - 1);
  const bool all_seen = begin >= item.first_of(last) && end <= item.position_of(query) + 1;
  for (int64_t lane = 0; lane < kTileRows; lane += kLanes) {
    float* const top = state.tops.data() + query + lane;
    float* const total = state.totals.data() + query + lane;
    const Vec before = load(top);
    std::optional<Sight> sight;
    if (!all_seen) sight.emplace(item, query + lane);
    const Vec decay = weigh(item, sight ? &*sight : nullptr, begin, end, lane, scores, weights, top, total);
    if (max_of(load(top) - before) == 0) continue;
    for (int i = 0; i < kLanes; ++i)
      for (Tile* output = outputs; output < outputs + num_outputs; ++output)
        scale(output->row(lane + i), kTileRows, decay[i]);
  }
  const int64_t width = item.width();
  const float* values = state.values.data() + (begin - block) / 2 * width;
  const int64_t num_steps = (end - begin + kStepTokens - 1) / kStepTokens;
  for (Tile* step = weights; step < weights + num_steps; ++step) transpose(*step);
  int64_t i = 0;
  for (; i + 4 <= num_outputs; i += 4, values += 4 * kTileRows) add_values<4>(values, width, weights, num_steps, outputs + i);
  if (i < num_outputs) add_values<2>(values, width, weights, num_steps, outputs + i);
}

// state: weighted sums of values, not yet divided by the totals.
inline void attend_by_tiles(const HeadItem& item, const float* sinks, HeadState& state) {
  begin_item(item, sinks, state);
  Tile scores[kBlockTokens / kTileRows];
  shape_tiles(TileShapes());
  prefetch_tokens(item, item.in.k_pages, item.first / kStepTokens * kStepTokens);
  for (int64_t block = item.first / kBlockTokens * kBlockTokens; block < item.end; block += kBlockTokens) {
    const auto begin_for = [&](int64_t key) { return std::max(block, key / kStepTokens * kStepTokens); };
    const int64_t block_end = std::min(block + kBlockTokens, item.end);
    bool paired = false;
    for (int64_t tile = 0; tile < item.num_tiles(); ++tile) {
      const int64_t query = tile * kTileRows;
      const int64_t begin = begin_for(item.first_of(item.position_of(query)));
      const int64_t end = std::min(block_end, item.position_of(query + kTileRows - 1) + 1);
      if (begin >= end) continue;
      score_keys(item, state.queries.data() + tile * (item.width() / kStepDims), begin, end, !paired, scores);
      if (!paired) pair_values(item, block, begin_for(item.first), block_end, state);
      paired = true;
      meet_keys(item, tile, block, begin, end, scores, state);
    }
  }
  release_tiles();
}

// out(query, d, 16 values from dimension d of its head on)
template <class Out>
void take_outputs(const HeadItem& item, HeadState& state, Out out) {
  const int64_t num_outputs = item.width() / kTileRows, dim = item.in.shape.dim;
  for (int64_t query = 0; query < item.num_queries(); ++query) {
    Tile* const outputs = state.outputs.data() + (query / kTileRows * num_outputs + item.dims_of(query) / kTileRows);
    for (int64_t d = 0; d < dim; d += kTileRows) out(query, d, outputs[d / kTileRows].row(query % kTileRows));
  }
}

// As prefill_item does.
inline void prefill_by_tiles(const Inputs<BFloat16>& in, const int32_t* item, int64_t kv_head, BFloat16* out) {
  static thread_local HeadState state;
  const int64_t position = item[kPosition], num_rows = item[kNumRows];
  const int64_t first = std::max<int64_t>(item[kFirstPage] * in.shape.page_size, in.first_key(position));
  const HeadItem head{in, item[kSequence], item[kRow], num_rows, kv_head, 1, position, first, position + num_rows};
  attend_by_tiles(head, in.sinks, state);
  take_outputs(head, state, [&](int64_t query, int64_t d, float* values) {
    scale(values, kTileRows, 1 / state.totals[query]);
    convert(out + head.place_of(query) + d, values, kTileRows);
  });
}

}  // namespace
