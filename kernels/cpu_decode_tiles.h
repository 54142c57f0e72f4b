// Decode items on AMX: those of a row and its drafts in one pass over the keys, and several KV heads in a tile.

#pragma once

#include <algorithm>
#include <vector>

#include "cpu_attention_tiles.h"

namespace {

// KV heads whose queries of one row fill a tile.
inline int64_t heads_of_tile(const Shape& shape) {
  return std::clamp<int64_t>(kTileRows / shape.group, 1, shape.kv_heads);
}

// Decode items of neighbouring rows of a sequence, a row and its drafts, that meet the same part of the keys.
struct Runs {
  std::vector<int32_t> items;   // their numbers, run by run
  std::vector<int32_t> begins;  // of each run, and the end of the last

  // Of a list in which a row's items follow each other, and a sequence's rows.
  void find(const Shape& s, const int32_t* list, int64_t count) {
    const auto field = [list](int32_t i, int f) -> int64_t { return list[i * kItemFields + f]; };
    const auto part = [&](int32_t i) { return field(i, kFirstPage) * s.page_size / kBlockTokens; };
    const auto follows = [&](int32_t before, int32_t i) {
      return field(i, kSequence) == field(before, kSequence) && part(i) == part(before) &&
             field(i, kRow) == field(before, kRow) + 1 && field(i, kKvLength) == field(before, kKvLength) + 1;
    };
    items.resize(count);
    begins.clear();
    for (int32_t begin = 0, end; begin < count; begin = end) {
      for (end = begin; end < count && field(end, kSequence) == field(begin, kSequence); ++end) items[end] = end;
      if (field(end - 1, kRow) != field(begin, kRow))
        std::stable_sort(items.begin() + begin, items.begin() + end, [&](int32_t a, int32_t b) { return part(a) < part(b); });
      for (int32_t i = begin; i < end; ++i)
        if (i == begin || !follows(items[i - 1], items[i])) begins.push_back(i);
    }
    begins.push_back(count);
  }

  int64_t size() const { return begins.size() - 1; }
};

// As decode_item does, for `num_kv_heads` of them and for the items of a run in one pass over the keys.
inline void decode_by_tiles(const Inputs<BFloat16>& in, const int32_t* items, const Runs& runs, int64_t run, int64_t kv_head,
                            int64_t num_kv_heads, const std::vector<Partial>& partials) {
  static thread_local HeadState state;
  const Shape& s = in.shape;
  const int32_t* numbers = runs.items.data() + runs.begins[run];
  const int64_t num_rows = runs.begins[run + 1] - runs.begins[run];
  const int32_t *item = items + numbers[0] * kItemFields, *last = items + numbers[num_rows - 1] * kItemFields;
  const int64_t position = item[kKvLength] - 1;
  const int64_t first = std::max<int64_t>(item[kFirstPage] * s.page_size, in.first_key(position));
  const int64_t end = std::min<int64_t>(last[kEndPage] * s.page_size, last[kKvLength]);
  const HeadItem head{in, item[kSequence], item[kRow], num_rows, kv_head, num_kv_heads, position, first, end};
  attend_by_tiles(head, nullptr, state);
  const auto partial_of = [&](int64_t query) { return partials[numbers[query / head.queries_of_row()]]; };
  for (int64_t query = 0; query < head.num_queries(); ++query) {
    partial_of(query).tops[head.head_of(query)] = state.tops[query] / kLog2E;
    partial_of(query).totals[head.head_of(query)] = state.totals[query];
  }
  take_outputs(head, state, [&](int64_t query, int64_t d, const float* values) {
    std::copy_n(values, kTileRows, partial_of(query).values + head.head_of(query) * s.dim + d);
  });
}

}  // namespace
