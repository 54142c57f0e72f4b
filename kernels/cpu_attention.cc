// Paged attention on a CPU, over the work list of kernels/plan.py: the native twin of kernels/xla.py. Queries,
// cache and outputs are float32 or bfloat16; everything in between is float32.
//
// Decode items hold a partial softmax over one KV tile (split-KV, as in Flash-Decoding) and are combined per sequence;
// prefill items walk their pages with an online softmax (as in FlashAttention). A task is one item for one KV head, whose
// `group` query heads share every key and value that is loaded.

#include <cmath>
#include <vector>

#include "cpu_common.h"

namespace {

// Columns of a work item.
enum { kSequence, kRow, kNumRows, kPosition, kFirstPage, kEndPage, kKvLength, kPartial, kItemFields };

// The greatest score of a row that has seen no key yet. Finite, so that the compiler may assume finite numbers: that is
// what lets it vectorise std::exp.
constexpr float kUnseen = -1e30f;
constexpr int kBlock = 64;  // keys that a prefill task scores together
constexpr int kRows = 4;    // query rows of a register tile
constexpr int64_t kAhead = 16;  // keys that a decode task has under way from memory

struct Shape {
  int64_t heads, kv_heads, group, dim, page_size, table_stride;
};

template <typename T>
struct Inputs {
  Shape shape;
  const T *q, *k_pages, *v_pages;  // [T, heads, dim], [pages, page_size, kv_heads, dim]
  const int32_t* tables;               // [sequences, pages]
  float scale;
  int64_t window;  // a query at position i sees the keys i - window < j <= i
  float softcap;   // 0: none

  int64_t token_offset(int32_t sequence, int64_t token, int64_t kv_head) const {
    const int64_t page = tables[sequence * shape.table_stride + token / shape.page_size];
    return ((page * shape.page_size + token % shape.page_size) * shape.kv_heads + kv_head) * shape.dim;
  }
};

template <typename T>
float dot(const float* a, const T* b, int64_t dim) {
  Vec sum = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) sum += load(a + d) * load(b + d);
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  for (; d < dim; ++d) total += a[d] * to_float(b[d]);
  return total;
}

void add_scaled(float* out, const float* x, float factor, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) out[d] += factor * x[d];
}

// sum[d] = the weighted sum of values[offset + d] over the offsets; returns up to which d, from d on.
template <int kVecs, typename T>
int64_t sum_columns(const float* weights, const T* values, const std::vector<int64_t>& offsets, int64_t d, int64_t dim,
                    float* sum) {
  for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes) {
    Vec sums[kVecs] = {};
    for (size_t t = 0; t < offsets.size(); ++t)
      for (int c = 0; c < kVecs; ++c) sums[c] += splat(weights[t]) * load(values + offsets[t] + d + c * kLanes);
    for (int c = 0; c < kVecs; ++c) store(sum + d + c * kLanes, sums[c]);
  }
  return d;
}

template <typename T>
void sum_values(const float* weights, const T* values, const std::vector<int64_t>& offsets, int64_t dim, float* sum) {
  int64_t d = sum_columns<4>(weights, values, offsets, 0, dim, sum);
  d = sum_columns<1>(weights, values, offsets, d, dim, sum);
  for (; d < dim; ++d) {
    sum[d] = 0;
    for (size_t t = 0; t < offsets.size(); ++t) sum[d] += weights[t] * to_float(values[offsets[t] + d]);
  }
}

// softcap * tanh(x / softcap), through exp of a negative number: it vectorises, and cannot overflow.
void soft_cap(float* x, int64_t count, float softcap) {
  for (int64_t i = 0; i < count; ++i) {
    const float e = std::exp(std::abs(x[i]) * (-2 / softcap));
    x[i] = std::copysign(softcap * (1 - e) / (1 + e), x[i]);
  }
}

template <typename T>
void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// Partial softmax of one decode item: per query head of the group its maximum, its sum, and the weighted values. Where
// the window hides the whole item, they are kUnseen, 0 and 0.
template <typename T>
void decode_item(const Inputs<T>& in, const int32_t* item, int64_t kv_head, float* top, float* total, float* value) {
  const Shape& s = in.shape;
  const int64_t begin = std::max<int64_t>(item[kFirstPage] * s.page_size, item[kKvLength] - in.window);
  const int64_t end = std::min<int64_t>(item[kEndPage] * s.page_size, item[kKvLength]);
  const int64_t length = std::max<int64_t>(end - begin, 0);
  thread_local std::vector<float> q, scores;
  thread_local std::vector<int64_t> offsets;
  q.resize(s.group * s.dim);
  scores.resize(s.group * length);
  convert(q.data(), in.q + (item[kRow] * s.heads + kv_head * s.group) * s.dim, s.group * s.dim);
  offsets.resize(length);
  for (int64_t t = 0; t < length; ++t) offsets[t] = in.token_offset(item[kSequence], begin + t, kv_head);
  // One head's keys are too far apart for the processor to foresee the next, and each is met by few queries.
  for (int64_t t = 0; t < std::min(kAhead, length); ++t) prefetch(in.k_pages + offsets[t], s.dim);
  for (int64_t t = 0; t < length; ++t) {
    if (t + kAhead < length) prefetch(in.k_pages + offsets[t + kAhead], s.dim);
    prefetch(in.v_pages + offsets[t], s.dim);
    const T* key = in.k_pages + offsets[t];
    for (int64_t g = 0; g < s.group; ++g) scores[g * length + t] = in.scale * dot(q.data() + g * s.dim, key, s.dim);
  }
  if (in.softcap > 0) soft_cap(scores.data(), s.group * length, in.softcap);
  for (int64_t g = 0; g < s.group; ++g) {
    float* row = scores.data() + g * length;
    float best = kUnseen, sum = 0;
    for (int64_t t = 0; t < length; ++t) best = std::max(best, row[t]);
    for (int64_t t = 0; t < length; ++t) row[t] = std::exp(row[t] - best);
    for (int64_t t = 0; t < length; ++t) sum += row[t];
    top[g] = best;
    total[g] = sum;
  }
  for (int64_t g = 0; g < s.group; ++g)
    sum_values(scores.data() + g * length, in.v_pages, offsets, s.dim, value + g * s.dim);
}

// Scores of kRows queries [kRows, dim] against kBlock keys, transposed to [dim, kBlock].
void score_tile(const float* q, const float* keys, int64_t dim, float scale, float* scores) {
  constexpr int kVecs = kBlock / kLanes;
  Vec sum[kRows][kVecs] = {};
  for (int64_t d = 0; d < dim; ++d) {
    for (int c = 0; c < kVecs; ++c) {
      const Vec key = load(keys + d * kBlock + c * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][c] += splat(q[r * dim + d]) * key;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVecs; ++c) store(scores + r * kBlock + c * kLanes, sum[r][c] * splat(scale));
}

// value[kRows, dim] = value * decay + weights[kRows, kBlock] @ values[kBlock, dim], kBlock lanes of dim at a time.
void value_tile(const float* weights, const float* values, const float* decay, int64_t dim, float* value) {
  constexpr int kVecs = 4;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes) {
    Vec sum[kRows][kVecs];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVecs; ++c) sum[r][c] = load(value + r * dim + d + c * kLanes) * splat(decay[r]);
    for (int t = 0; t < kBlock; ++t) {
      for (int c = 0; c < kVecs; ++c) {
        const Vec v = load(values + t * dim + d + c * kLanes);
        for (int r = 0; r < kRows; ++r) sum[r][c] += splat(weights[r * kBlock + t]) * v;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kVecs; ++c) store(value + r * dim + d + c * kLanes, sum[r][c]);
  }
  for (; d < dim; ++d) {
    for (int r = 0; r < kRows; ++r) {
      float sum = value[r * dim + d] * decay[r];
      for (int t = 0; t < kBlock; ++t) sum += weights[r * kBlock + t] * values[t * dim + d];
      value[r * dim + d] = sum;
    }
  }
}

// One prefill item for one KV head. Its queries are the item's rows times the group's heads, padded to kRows.
template <typename T>
void prefill_item(const Inputs<T>& in, const int32_t* item, int64_t kv_head, T* out) {
  const Shape& s = in.shape;
  const int64_t num_queries = item[kNumRows] * s.group;
  const int64_t padded = (num_queries + kRows - 1) / kRows * kRows;
  const int64_t first = std::max<int64_t>(item[kFirstPage] * s.page_size, item[kPosition] + 1 - in.window);
  const int64_t end = item[kPosition] + item[kNumRows];
  thread_local std::vector<float> scratch;
  scratch.assign(padded * (2 * s.dim + 2) + 2 * kBlock * s.dim, 0.0f);
  float* q = scratch.data();
  float* value = q + padded * s.dim;
  float* top = value + padded * s.dim;
  float* total = top + padded;
  float* keys = total + padded;
  float* values = keys + kBlock * s.dim;
  const auto row_of = [&](int64_t query) {
    return ((item[kRow] + query / s.group) * s.heads + kv_head * s.group + query % s.group) * s.dim;
  };
  for (int64_t m = 0; m < num_queries; ++m) convert(q + m * s.dim, in.q + row_of(m), s.dim);
  for (int64_t m = 0; m < padded; ++m) top[m] = kUnseen;

  for (int64_t begin = first; begin < end; begin += kBlock) {
    const int64_t length = std::min<int64_t>(kBlock, end - begin);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t offset = in.token_offset(item[kSequence], begin + t, kv_head);
      for (int64_t d = 0; d < s.dim; ++d) keys[d * kBlock + t] = to_float(in.k_pages[offset + d]);
      convert(values + t * s.dim, in.v_pages + offset, s.dim);
    }
    for (int64_t m = 0; m < padded; m += kRows) {
      const int64_t earliest = item[kPosition] + m / s.group;
      const int64_t latest = item[kPosition] + (m + kRows - 1) / s.group;
      if (begin > latest || begin + length <= earliest + 1 - in.window) continue;  // none of the rows sees the block
      float weights[kRows * kBlock], decay[kRows];
      score_tile(q + m * s.dim, keys, s.dim, in.scale, weights);
      if (in.softcap > 0) soft_cap(weights, kRows * kBlock, in.softcap);
      for (int r = 0; r < kRows; ++r) {
        float* row = weights + r * kBlock;
        const int64_t position = item[kPosition] + (m + r) / s.group;
        const int64_t hidden = std::min(length, std::max<int64_t>(position + 1 - in.window - begin, 0));
        const int64_t visible = std::min(length, std::max<int64_t>(position + 1 - begin, 0));
        float best = top[m + r], sum = 0;
        for (int64_t t = hidden; t < visible; ++t) best = std::max(best, row[t]);
        // What is not seen weighs 0, also in a row that has seen nothing yet. Masked scores instead would give such a
        // row weights, and a vectorised exp falls back to slow scalar calls so far from 0.
        for (int64_t t = 0; t < hidden; ++t) row[t] = 0;
        for (int64_t t = hidden; t < visible; ++t) row[t] = std::exp(row[t] - best);
        for (int64_t t = visible; t < kBlock; ++t) row[t] = 0;
        for (int t = 0; t < kBlock; ++t) sum += row[t];
        decay[r] = std::exp(top[m + r] - best);
        total[m + r] = total[m + r] * decay[r] + sum;
        top[m + r] = best;
      }
      value_tile(weights, values, decay, s.dim, value + m * s.dim);
    }
  }
  for (int64_t m = 0; m < num_queries; ++m) {
    for (int64_t d = 0; d < s.dim; ++d) value[m * s.dim + d] /= total[m];
    convert(out + row_of(m), value + m * s.dim, s.dim);
  }
}

template <typename T>
void paged_attention(ffi::ThreadPool& pool, const Inputs<T>& in, const int32_t* decode_items, int64_t num_decode,
                     const int32_t* prefill_items, int64_t num_prefill, T* out) {
  const Shape& shape = in.shape;
  const int64_t heads = shape.heads, kv_heads = shape.kv_heads, dim = shape.dim;
  // Per decode item: tops [heads], totals [heads], values [heads, dim].
  const int64_t partial = heads * (dim + 2);
  static thread_local std::vector<float> partials;
  partials.resize(num_decode * partial);
  float* base = partials.data();
  // Prefill first: its tasks are the longest.
  parallel_for(pool, (num_prefill + num_decode) * kv_heads, [&](int64_t task) {
    const int64_t index = task / kv_heads, kv_head = task % kv_heads;
    if (index < num_prefill) return prefill_item(in, prefill_items + index * kItemFields, kv_head, out);
    const int64_t item = index - num_prefill, first = kv_head * shape.group;
    float* mine = base + item * partial;
    decode_item(in, decode_items + item * kItemFields, kv_head, mine + first, mine + heads + first,
                mine + 2 * heads + first * dim);
  });

  // A sequence's items follow each other: combine the run.
  std::vector<float> combined(dim);
  for (int64_t begin = 0, end; begin < num_decode; begin = end) {
    const int32_t row = decode_items[begin * kItemFields + kRow];
    for (end = begin + 1; end < num_decode && decode_items[end * kItemFields + kRow] == row; ++end) {
    }
    for (int64_t h = 0; h < heads; ++h) {
      float best = kUnseen, total = 0;
      for (int64_t i = begin; i < end; ++i) best = std::max(best, base[i * partial + h]);
      for (int64_t i = begin; i < end; ++i)
        total += std::exp(base[i * partial + h] - best) * base[i * partial + heads + h];
      std::fill(combined.begin(), combined.end(), 0.0f);
      for (int64_t i = begin; i < end; ++i) {
        const float weight = std::exp(base[i * partial + h] - best) / total;
        add_scaled(combined.data(), base + i * partial + 2 * heads + h * dim, weight, dim);
      }
      convert(out + (row * heads + h) * dim, combined.data(), dim);
    }
  }
}

ffi::Error PagedAttention(ffi::ThreadPool pool, float scale, int64_t window, float softcap, ffi::AnyBuffer q,
                          ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::Buffer<ffi::S32> tables,
                          ffi::Buffer<ffi::S32> decode, ffi::Buffer<ffi::S32> prefill, ffi::Buffer<ffi::S32> counts,
                          ffi::Result<ffi::AnyBuffer> result) {
  const auto q_dims = q.dimensions(), kv_dims = k_pages.dimensions();
  const int64_t heads = q_dims[1], kv_heads = kv_dims[2], dim = q_dims[2];
  const Shape shape{heads, kv_heads, heads / kv_heads, dim, kv_dims[1], tables.dimensions()[1]};
  std::memset(result->untyped_data(), 0, result->size_bytes());  // rows of no sequence are zero
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto typed = [](const ffi::AnyBuffer& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
    const Inputs<T> in{shape, typed(q), typed(k_pages), typed(v_pages), tables.typed_data(), scale, window, softcap};
    const int32_t* num_items = counts.typed_data();
    paged_attention(pool, in, decode.typed_data(), num_items[0], prefill.typed_data(), num_items[1],
                    static_cast<T*>(result->untyped_data()));
  };
  if (q.element_type() == ffi::F32) {
    run(float{});
  } else {
    run(BFloat16{});
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Arg<ffi::AnyBuffer>()           // q
                                  .Arg<ffi::AnyBuffer>()           // k_pages
                                  .Arg<ffi::AnyBuffer>()           // v_pages
                                  .Arg<ffi::Buffer<ffi::S32>>()   // tables
                                  .Arg<ffi::Buffer<ffi::S32>>()   // decode items
                                  .Arg<ffi::Buffer<ffi::S32>>()   // prefill items
                                  .Arg<ffi::Buffer<ffi::S32>>()   // counts
                                  .Ret<ffi::AnyBuffer>());
