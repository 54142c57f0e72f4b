// Attention on AMX (cpu_tiles.h), over work items of prefill and of decode alike: bfloat16 products, softmax in float32.
//
// Scores are made transposed, S^T = K Q^T, so that keys are the first operand straight from their pages. Then 16 queries lie
// side by side in a row of scores, and the softmax runs down the rows without sums across a vector. Two neighbouring rows of
// weights, rounded to bfloat16, are a row of the second operand of O^T = V^T P^T as they come; only V has to be turned, once
// for all queries of an item.
//
// Blocks of keys and the tokens of a product lie at multiples of their sizes, and a key that a query does not see adds zero:
// so a query's result does not depend on which others are in its item.

#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu_attention.h"
#include "cpu_tiles.h"

namespace {

constexpr int64_t kBlockTokens = 128;
constexpr int64_t kStepTokens = 32;  // that one product of tiles sums over
constexpr int64_t kSteps = kBlockTokens / kStepTokens;
constexpr int64_t kStepDims = 32;

struct alignas(kRowBytes) Tile {
  uint32_t bits[kTileRows][kTileDepth];

  float* row(int64_t i) { return reinterpret_cast<float*>(bits[i]); }
};

// ---- 16 x 16 values of 32 bits, turned.

typedef uint32_t TileRow __attribute__((vector_size(kRowBytes), may_alias));
typedef int32_t TileLanes __attribute__((vector_size(kRowBytes)));
#ifdef __clang__
#define JAXSERVE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define JAXSERVE_SHUFFLE(a, b, ...) (TileRow) __builtin_shuffle(a, b, TileLanes{__VA_ARGS__})
#endif
#define JAXSERVE_EACH_LANE(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)

// Swaps what lies `kHalf` rows below and to the left with what lies as far above and to the right.
template <int kHalf>
inline void swap_halves(Tile& tile) {
#define JAXSERVE_UPPER(lane) (((lane) & kHalf) ? kTileRows + (lane)-kHalf : (lane))
#define JAXSERVE_LOWER(lane) (((lane) & kHalf) ? kTileRows + (lane) : (lane) + kHalf)
  for (int i = 0; i < kTileRows; ++i) {
    if (i & kHalf) continue;
    TileRow& upper = *reinterpret_cast<TileRow*>(tile.bits[i]);
    TileRow& lower = *reinterpret_cast<TileRow*>(tile.bits[i + kHalf]);
    const TileRow a = upper, b = lower;
    upper = JAXSERVE_SHUFFLE(a, b, JAXSERVE_EACH_LANE(JAXSERVE_UPPER));
    lower = JAXSERVE_SHUFFLE(a, b, JAXSERVE_EACH_LANE(JAXSERVE_LOWER));
  }
#undef JAXSERVE_UPPER
#undef JAXSERVE_LOWER
}

inline void transpose(Tile& tile) {
  swap_halves<8>(tile);
  swap_halves<4>(tile);
  swap_halves<2>(tile);
  swap_halves<1>(tile);
}

#undef JAXSERVE_SHUFFLE
#undef JAXSERVE_EACH_LANE

// ---- One item for one KV head.

// Rows of a sequence and the run of keys that they meet; a query is one head of one row.
struct HeadItem {
  const Inputs<BFloat16>& in;
  int64_t sequence, row, num_rows, kv_head;
  int64_t position;    // of the first row
  int64_t first, end;  // keys

  int64_t num_queries() const { return num_rows * in.shape.group; }
  int64_t num_tiles() const { return (num_queries() + kTileRows - 1) / kTileRows; }
  // Queries that fill the last tile are at the last row's.
  int64_t position_of(int64_t query) const { return position + std::min(query / in.shape.group, num_rows - 1); }
  // Where a query begins, and what comes of it.
  int64_t place_of(int64_t query) const {
    const Shape& s = in.shape;
    return ((row + query / s.group) * s.heads + kv_head * s.group + query % s.group) * s.dim;
  }
  // Where the key and the value of a token begin; those of its page follow in strides.
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
  std::vector<Tile> queries;         // of each tile of 16: [dim / 32], 16 pairs of dimensions x 16 queries
  std::vector<Tile> values;          // of a block: [dim / 16][kSteps], 16 dimensions x 32 tokens
  std::vector<Tile> outputs;         // of each tile of queries: [dim / 16], 16 dimensions x 16 queries
  std::vector<float> tops, totals;   // of each query: the greatest score, and the sum of weights relative to it
};

// sinks: of the KV head's queries, which have seen them before all keys; null: none.
inline void begin_item(const HeadItem& item, const float* sinks, HeadState& state) {
  const int64_t dim = item.in.shape.dim, tiles = item.num_tiles();
  state.queries.assign(tiles * dim / kStepDims, Tile{});
  state.values.resize(dim / kTileRows * kSteps);
  state.outputs.assign(tiles * dim / kTileRows, Tile{});
  state.tops.assign(tiles * kTileRows, kUnseen);
  state.totals.assign(tiles * kTileRows, 0.0f);
  for (int64_t query = 0; query < item.num_queries(); ++query) {
    const BFloat16* from = item.in.q + item.place_of(query);
    Tile* tiles_of_query = state.queries.data() + query / kTileRows * (dim / kStepDims);
    for (int64_t d = 0; d < dim; d += kStepDims)
      std::memcpy(tiles_of_query[d / kStepDims].bits[query % kTileRows], from + d, kRowBytes);
    if (sinks == nullptr) continue;
    state.tops[query] = sinks[query % item.in.shape.group];
    state.totals[query] = 1;
  }
  for (Tile& tile : state.queries) transpose(tile);
}

// 16 tokens from a multiple of 16 on.
inline void prefetch_tokens(const HeadItem& item, const BFloat16* pages, int64_t token) {
  if (token >= item.end) return;
  const char* from = reinterpret_cast<const char*>(pages + item.token_place(token));
  for (int64_t i = 0; i < kTileRows; ++i, from += item.stride() * sizeof(BFloat16))
    for (int64_t byte = 0; byte < item.in.shape.dim * int64_t{sizeof(BFloat16)}; byte += 64)
      __builtin_prefetch(from + byte);
}

// scores: 16 tokens x 16 queries each, of the tokens from `begin`, a multiple of 32, to `end`. is_first: no queries before
// these have met the keys, which come from memory, as the values soon will.
inline void score_keys(const HeadItem& item, const Tile* queries, int64_t begin, int64_t end, bool is_first, Tile* scores) {
  const int64_t row_bytes = item.stride() * sizeof(BFloat16);
  for (int64_t t = begin; t < end; t += kStepTokens, scores += 2) {
    const BFloat16* keys = item.in.k_pages + item.token_place(t);
    const BFloat16* next = t + kTileRows < end ? item.in.k_pages + item.token_place(t + kTileRows) : keys;
    for (int64_t i = 0; is_first && i < kStepTokens; i += kTileRows) {
      prefetch_tokens(item, item.in.k_pages, t + kStepTokens + i);
      prefetch_tokens(item, item.in.v_pages, t + i);
    }
    clear_tile<0>();
    clear_tile<1>();
    for (int64_t d = 0; d < item.in.shape.dim; d += kStepDims) {
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
inline void turn_values(const HeadItem& item, int64_t block, int64_t begin, int64_t end, HeadState& state) {
  const BFloat16* tokens[kStepTokens];
  for (int64_t t = begin; t < end; t += kStepTokens) {
    for (int64_t i = 0; i < kStepTokens; ++i) {
      const bool met = t + i >= item.first && t + i < item.end;
      tokens[i] = met ? item.in.v_pages + item.token_place(t + i) : nullptr;
    }
    const auto value = [&](int64_t i, int64_t d) { return tokens[i] ? (Bits)load(tokens[i] + d) : Bits{}; };
    Tile* const step = state.values.data() + (t - block) / kStepTokens;
    for (int64_t d = 0; d < item.in.shape.dim; d += kTileRows) {
      Tile& tile = step[d / kTileRows * kSteps];
      for (int64_t pair = 0; pair < kTileDepth; ++pair)
        for (int64_t lane = 0; lane < kTileRows; lane += kLanes)
          store(tile.row(pair) + lane, (Vec)(value(2 * pair, d + lane) >> 16 | value(2 * pair + 1, d + lane)));
      transpose(tile);
    }
  }
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
    Vec score = load(place) * splat(item.in.scale);
    if (item.in.softcap > 0) score = soft_cap(score, item.in.softcap);
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
    const Vec e = score > kUnseen ? exp_of_negative(score - best) : Vec{};
    sum += e;
    return e;
  };
  for (int64_t t = begin; t < (end + kStepTokens - 1) / kStepTokens * kStepTokens; t += 2) {
    const Bits even = (Bits)weight(t) + 0x8000, odd = (Bits)weight(t + 1) + 0x8000;  // to the nearest
    store(row(weights, (t - begin) / 2), (Vec)(even >> 16 | (odd & 0xffff0000u)));
  }
  const Vec decay = exp_of_negative(before - best);
  store(top, best);
  store(total, load(total) * decay + sum);
  return decay;
}

// outputs[kCount] += values[kCount][kSteps] times weights, over num_steps of 32 tokens.
template <int kCount>
inline void add_values(const Tile* values, const Tile* weights, int64_t num_steps, Tile* outputs) {
  load_tile<0>(outputs, kRowBytes);
  load_tile<1>(outputs + 1, kRowBytes);
  if constexpr (kCount == 4) {
    load_tile<2>(outputs + 2, kRowBytes);
    load_tile<3>(outputs + 3, kRowBytes);
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    load_tile<4>(weights + step, kRowBytes);
    load_tile<5>(values + step, kRowBytes);
    multiply_tiles<0, 5, 4>();
    load_tile<6>(values + kSteps + step, kRowBytes);
    multiply_tiles<1, 6, 4>();
    if constexpr (kCount == 4) {
      load_tile<7>(values + 2 * kSteps + step, kRowBytes);
      multiply_tiles<2, 7, 4>();
      load_tile<5>(values + 3 * kSteps + step, kRowBytes);
      multiply_tiles<3, 5, 4>();
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
  const int64_t query = tile * kTileRows, num_outputs = item.in.shape.dim / kTileRows;
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
    for (int64_t d = 0; d < item.in.shape.dim; ++d) {
      float* place = outputs[d / kTileRows].row(d % kTileRows) + lane;
      store(place, load(place) * decay);
    }
  }
  const Tile* values = state.values.data() + (begin - block) / kStepTokens;
  const int64_t num_steps = (end - begin + kStepTokens - 1) / kStepTokens;
  int64_t i = 0;
  for (; i + 4 <= num_outputs; i += 4) add_values<4>(values + i * kSteps, weights, num_steps, outputs + i);
  if (i < num_outputs) add_values<2>(values + i * kSteps, weights, num_steps, outputs + i);
}

// state: weighted sums of values, not yet divided by the totals.
inline void attend_by_tiles(const HeadItem& item, const float* sinks, HeadState& state) {
  begin_item(item, sinks, state);
  const int64_t dim = item.in.shape.dim;
  Tile scores[kBlockTokens / kTileRows];
  shape_tiles(TileShapes());
  for (int64_t i = 0; i < kStepTokens; i += kTileRows)
    prefetch_tokens(item, item.in.k_pages, item.first / kStepTokens * kStepTokens + i);
  for (int64_t block = item.first / kBlockTokens * kBlockTokens; block < item.end; block += kBlockTokens) {
    const auto begin_for = [&](int64_t key) { return std::max(block, key / kStepTokens * kStepTokens); };
    const int64_t block_end = std::min(block + kBlockTokens, item.end);
    bool turned = false;
    for (int64_t tile = 0; tile < item.num_tiles(); ++tile) {
      const int64_t query = tile * kTileRows;
      const int64_t begin = begin_for(item.first_of(item.position_of(query)));
      const int64_t end = std::min(block_end, item.position_of(query + kTileRows - 1) + 1);
      if (begin >= end) continue;
      score_keys(item, state.queries.data() + tile * (dim / kStepDims), begin, end, !turned, scores);
      if (!turned) turn_values(item, block, begin_for(item.first), block_end, state);
      turned = true;
      meet_keys(item, tile, block, begin, end, scores, state);
    }
  }
  release_tiles();
}

// out(query, d, 16 values from dimension d on), times each query's share.
template <class Out>
void take_outputs(const HeadItem& item, const std::vector<float>& shares, HeadState& state, Out out) {
  const int64_t num_outputs = item.in.shape.dim / kTileRows;
  for (int64_t i = 0; i < static_cast<int64_t>(state.outputs.size()); ++i) {
    Tile& tile = state.outputs[i];
    const int64_t query = i / num_outputs * kTileRows, d = i % num_outputs * kTileRows;
    for (int64_t row = 0; row < kTileRows; ++row)
      for (int64_t lane = 0; lane < kTileRows; lane += kLanes)
        store(tile.row(row) + lane, load(tile.row(row) + lane) * load(shares.data() + query + lane));
    transpose(tile);
    for (int64_t row = 0; row < std::min<int64_t>(kTileRows, item.num_queries() - query); ++row)
      out(query + row, d, tile.row(row));
  }
}

// As prefill_item does.
inline void prefill_by_tiles(const Inputs<BFloat16>& in, const int32_t* item, int64_t kv_head, BFloat16* out) {
  static thread_local HeadState state;
  const int64_t position = item[kPosition], num_rows = item[kNumRows];
  const int64_t first = std::max<int64_t>(item[kFirstPage] * in.shape.page_size, in.first_key(position));
  const HeadItem head{in, item[kSequence], item[kRow], num_rows, kv_head, position, first, position + num_rows};
  attend_by_tiles(head, in.sinks ? in.sinks + kv_head * in.shape.group : nullptr, state);
  for (float& total : state.totals) total = 1 / total;
  take_outputs(head, state.totals, state, [&](int64_t query, int64_t d, const float* values) {
    convert(out + head.place_of(query) + d, values, kTileRows);
  });
}

// As decode_item does.
inline void decode_by_tiles(const Inputs<BFloat16>& in, const int32_t* item, int64_t kv_head, float* top, float* total,
                            float* value) {
  static thread_local HeadState state;
  const Shape& s = in.shape;
  const int64_t position = item[kKvLength] - 1;
  const int64_t first = std::max<int64_t>(item[kFirstPage] * s.page_size, in.first_key(position));
  const int64_t end = std::min<int64_t>(item[kEndPage] * s.page_size, item[kKvLength]);
  const HeadItem head{in, item[kSequence], item[kRow], 1, kv_head, position, first, end};
  attend_by_tiles(head, nullptr, state);
  std::copy_n(state.tops.data(), s.group, top);
  std::copy_n(state.totals.data(), s.group, total);
  const std::vector<float> whole(state.tops.size(), 1.0f);
  take_outputs(head, whole, state, [&](int64_t query, int64_t d, const float* values) {
    std::copy_n(values, kTileRows, value + query * s.dim + d);
  });
}

}  // namespace
