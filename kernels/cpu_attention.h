// What paged attention takes on a CPU, whatever computes it.

#pragma once

#include <cmath>
#include <vector>

#include "cpu_common.h"

namespace {

// Columns of a work item.
enum { kSequence, kRow, kNumRows, kPosition, kFirstPage, kEndPage, kKvLength, kPartial, kItemFields };

constexpr float kUnseen = -1e30f;  // the greatest score of a row that has seen no key yet

struct Shape {
  int64_t heads, kv_heads, group, dim, page_size, table_stride;
};

template <typename T>
struct Inputs {
  Shape shape;
  const T *q, *k_pages, *v_pages;  // [T, heads, dim], [pages, page_size, kv_heads, dim]
  const int32_t* tables;               // [sequences, pages]
  int64_t layer_page;                  // the layer's first
  float scale;
  int64_t window;  // a query at position i sees the keys i - window < j <= i
  int64_t chunk;   // or, if it is not 0, those from i / chunk * chunk on
  float softcap;   // 0: none
  const float* sinks;  // [heads]: the score of a key without a value that all queries see; null: none

  // The first key that a query at a position sees; may be negative.
  int64_t first_key(int64_t position) const {
    return chunk > 0 ? position / chunk * chunk : position + 1 - window;
  }

  // Where the keys and values of tokens begin ... end - 1 begin.
  void find_tokens(int32_t sequence, int64_t begin, int64_t end, int64_t kv_head, std::vector<int64_t>& offsets) const {
    offsets.clear();
    for (int64_t page = begin / shape.page_size; page * shape.page_size < end; ++page) {
      const int64_t first = page * shape.page_size;
      const int64_t place = (layer_page + tables[sequence * shape.table_stride + page]) * shape.page_size - first;
      for (int64_t t = std::max(begin, first); t < std::min(end, first + shape.page_size); ++t)
        offsets.push_back(((place + t) * shape.kv_heads + kv_head) * shape.dim);
    }
  }
};

// What a decode item leaves, of all heads: a softmax over some of the keys.
struct Partial {
  float *tops, *totals, *values;  // [heads] each the greatest score and the sum of weights relative to it; [heads, dim]
};

inline void add_scaled(float* out, const float* x, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) out[d] += factor * x[d];
}

// out = the softmax over all that the decode items of one row leave.
template <typename T>
void combine(const Inputs<T>& in, const std::vector<Partial>& partials, int64_t begin, int64_t end, T* out) {
  const int64_t dim = in.shape.dim;
  thread_local std::vector<float> combined;
  combined.resize(dim);
  for (int64_t h = 0; h < in.shape.heads; ++h) {
    float best = in.sinks ? in.sinks[h] : kUnseen;
    for (int64_t i = begin; i < end; ++i) best = std::max(best, partials[i].tops[h]);
    float total = in.sinks ? std::exp(in.sinks[h] - best) : 0;
    for (int64_t i = begin; i < end; ++i) total += std::exp(partials[i].tops[h] - best) * partials[i].totals[h];
    std::fill(combined.begin(), combined.end(), 0.0f);
    for (int64_t i = begin; i < end; ++i)
      add_scaled(combined.data(), partials[i].values + h * dim, std::exp(partials[i].tops[h] - best) / total, dim);
    convert(out + h * dim, combined.data(), dim);
  }
}

// softcap * tanh(x / softcap), through exp of a negative number, which cannot overflow.
inline Vec soft_cap(Vec x, float softcap) {
  const Vec magnitude = x < 0 ? -x : x;
  const Vec e = exp_of_negative(magnitude * (-2 / softcap));
  const Vec capped = softcap * (1 - e) / (1 + e);
  return x < 0 ? -capped : capped;
}

}  // namespace
