// Paged attention on a CPU, over the work list of kernels/plan.py: the native twin of kernels/xla.py. Queries,
// cache and outputs are float32 or bfloat16; everything in between is float32, but on AMX weights are bfloat16.
//
// Decode items hold a partial softmax over one KV tile (split-KV, as in Flash-Decoding) and are combined per sequence;
// prefill items walk their pages with an online softmax (as in FlashAttention). A task is one item for one KV head, whose
// `group` query heads share every key and value that is loaded.

#include <cmath>
#include <vector>

#include "cpu_attention.h"
#include "cpu_decode_tiles.h"

namespace {

constexpr int kVecs = 4;           // of a register tile's columns
constexpr int kBlock = kVecs * kLanes;  // keys that a prefill task scores together
#ifdef __AVX512F__
constexpr int kRows = 6;  // query rows of a register tile: 24 sums of 32 registers
#else
constexpr int kRows = 3;  // 12 of 16
#endif
constexpr int kHeads = 4;       // query heads that a decode task handles together
constexpr int64_t kAhead = 16;  // keys that a decode task has under way from memory

void soft_cap(float* x, int64_t count, float softcap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, count - i);
    store_some(x + i, soft_cap(load_some(x + i, some), softcap), some);
  }
}

float greatest(const float* x, int64_t count) {
  Vec best = splat(kUnseen);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) best = max_of(best, load(x + i));
  float result = max_of(best);
  for (; i < count; ++i) result = std::max(result, x[i]);
  return result;
}

// x = exp(x - top), where no x exceeds top; returns the sum.
float exps(float* x, int64_t count, float top) {
  Vec sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec e = exp_of_negative(load(x + i) - top);
    store(x + i, e);
    sum += e;
  }
  float total = sum_of(sum);
  if (i < count) {
    store_some(x + i, exp_of_negative(load_some(x + i, count - i) - top), count - i);
    for (; i < count; ++i) total += x[i];
  }
  return total;
}

template <typename T>
void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// scores[h * stride] = scale * q[h] . key, of kNumHeads heads.
template <int kNumHeads, typename T>
void score_key(const float* q, const T* key, int64_t dim, float scale, int64_t stride, float* scores) {
  Vec sums[kNumHeads] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Vec k = load(key + d);
    for (int h = 0; h < kNumHeads; ++h) sums[h] += load(q + h * dim + d) * k;
  }
  for (int h = 0; h < kNumHeads; ++h) {
    float sum = sum_of(sums[h]);
    for (int64_t rest = d; rest < dim; ++rest) sum += q[h * dim + rest] * to_float(key[rest]);
    scores[h * stride] = scale * sum;
  }
}

// out[h, d] = the weighted sum of values[offset + d] over the offsets, of kNumHeads heads; returns up to which d, from d
// on.
template <int kNumHeads, int kNumVecs, typename T>
int64_t sum_columns(const float* weights, const T* values, const std::vector<int64_t>& offsets, int64_t d, int64_t dim,
                    float* out) {
  const int64_t length = offsets.size();
  for (; d + kNumVecs * kLanes <= dim; d += kNumVecs * kLanes) {
    Vec sums[kNumHeads][kNumVecs] = {};
    for (int64_t t = 0; t < length; ++t) {
      for (int c = 0; c < kNumVecs; ++c) {
        const Vec v = load(values + offsets[t] + d + c * kLanes);
        for (int h = 0; h < kNumHeads; ++h) sums[h][c] += splat(weights[h * length + t]) * v;
      }
    }
    for (int h = 0; h < kNumHeads; ++h)
      for (int c = 0; c < kNumVecs; ++c) store(out + h * dim + d + c * kLanes, sums[h][c]);
  }
  return d;
}

// Scores of all keys, then their softmax, then the weighted values, of kNumHeads query heads.
template <int kNumHeads, typename T>
void decode_heads(const Inputs<T>& in, const float* q, const std::vector<int64_t>& offsets, std::vector<float>& scores,
                  float* top, float* total, float* value) {
  const int64_t dim = in.shape.dim, length = offsets.size();
  scores.resize(kNumHeads * length);
  for (int64_t t = 0; t < length; ++t) {
    // One head's keys are too far apart for the processor to foresee the next, and each is met by few queries.
    if (t + kAhead < length) prefetch(in.k_pages + offsets[t + kAhead], dim);
    prefetch(in.v_pages + offsets[t], dim);
    score_key<kNumHeads>(q, in.k_pages + offsets[t], dim, in.scale, length, scores.data() + t);
  }
  if (in.softcap > 0) soft_cap(scores.data(), kNumHeads * length, in.softcap);
  for (int h = 0; h < kNumHeads; ++h) {
    float* row = scores.data() + h * length;
    top[h] = greatest(row, length);
    total[h] = exps(row, length, top[h]);
  }
  int64_t d = sum_columns<kNumHeads, kVecs>(scores.data(), in.v_pages, offsets, 0, dim, value);
  d = sum_columns<kNumHeads, 1>(scores.data(), in.v_pages, offsets, d, dim, value);
  for (; d < dim; ++d) {
    for (int h = 0; h < kNumHeads; ++h) {
      float sum = 0;
      for (int64_t t = 0; t < length; ++t) sum += scores[h * length + t] * to_float(in.v_pages[offsets[t] + d]);
      value[h * dim + d] = sum;
    }
  }
}

// Of one KV head's queries. Where the window hides the whole item, tops are kUnseen and the rest is 0.
template <typename T>
void decode_item(const Inputs<T>& in, const int32_t* item, int64_t kv_head, const Partial& partial) {
  const Shape& s = in.shape;
  const int64_t begin = std::max<int64_t>(item[kFirstPage] * s.page_size, in.first_key(item[kKvLength] - 1));
  const int64_t end = std::min<int64_t>(item[kEndPage] * s.page_size, item[kKvLength]);
  thread_local std::vector<float> q, scores;
  thread_local std::vector<int64_t> offsets;
  in.find_tokens(item[kSequence], begin, end, kv_head, offsets);
  for (size_t t = 0; t < std::min<size_t>(kAhead, offsets.size()); ++t) prefetch(in.k_pages + offsets[t], s.dim);
  q.resize(s.group * s.dim);
  convert(q.data(), in.q + (item[kRow] * s.heads + kv_head * s.group) * s.dim, s.group * s.dim);
  for (int64_t h = 0; h < s.group; h += kHeads) {
    const int64_t head = kv_head * s.group + h;
    const auto run = [&](auto heads) {
      decode_heads<heads>(in, q.data() + h * s.dim, offsets, scores, partial.tops + head, partial.totals + head,
                          partial.values + head * s.dim);
    };
    switch (std::min<int64_t>(kHeads, s.group - h)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      default: run(std::integral_constant<int, kHeads>{});
    }
  }
}

// Scores of kRows queries [kRows, dim] against kBlock keys, transposed to [dim, kBlock].
void score_tile(const float* q, const float* keys, int64_t dim, float scale, float* scores) {
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

// scores[kBlock] -> weights relative to the greatest score so far, `top`, which they may raise: of the keys from `hidden`
// to `visible`, 0 for others. Returns their sum.
float softmax_row(float* scores, int64_t hidden, int64_t visible, float* top) {
  Vec row[kVecs], best = splat(*top);
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Ints from = (int32_t)hidden - Ints{}, to = (int32_t)visible - Ints{};
  for (int c = 0; c < kVecs; ++c) {
    const Ints t = lane + c * kLanes, seen = (t >= from) & (t < to);
    row[c] = seen ? load(scores + c * kLanes) : splat(kUnseen);
    best = max_of(best, row[c]);
  }
  *top = max_of(best);
  Vec sum = {};
  for (int c = 0; c < kVecs; ++c) {
    // Not by a score of kUnseen: a row that has seen nothing yet would give it weight.
    const Ints t = lane + c * kLanes, seen = (t >= from) & (t < to);
    row[c] = seen ? exp_of_negative(row[c] - *top) : Vec{};
    store(scores + c * kLanes, row[c]);
    sum += row[c];
  }
  return sum_of(sum);
}

// One prefill item for one KV head. Its queries are the item's rows times the group's heads, padded to kRows.
template <typename T>
void prefill_item(const Inputs<T>& in, const int32_t* item, int64_t kv_head, T* out) {
  if constexpr (kMultipliesTiles<T>)
    if (fits_tiles(in.shape)) return prefill_by_tiles(in, item, kv_head, out);
  const Shape& s = in.shape;
  const int64_t num_queries = item[kNumRows] * s.group;
  const int64_t padded = (num_queries + kRows - 1) / kRows * kRows;
  const int64_t first = std::max<int64_t>(item[kFirstPage] * s.page_size, in.first_key(item[kPosition]));
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
  for (int64_t m = 0; m < padded; ++m) {  // a sink is a key that has been seen before all others
    top[m] = in.sinks ? in.sinks[kv_head * s.group + m % s.group] : kUnseen;
    total[m] = in.sinks ? 1 : 0;
  }

  thread_local std::vector<int64_t> offsets;
  for (int64_t begin = first; begin < end; begin += kBlock) {
    const int64_t length = std::min<int64_t>(kBlock, end - begin);
    in.find_tokens(item[kSequence], begin, begin + length, kv_head, offsets);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t d = 0; d < s.dim; ++d) keys[d * kBlock + t] = to_float(in.k_pages[offsets[t] + d]);
      convert(values + t * s.dim, in.v_pages + offsets[t], s.dim);
    }
    for (int64_t m = 0; m < padded; m += kRows) {
      const int64_t earliest = item[kPosition] + m / s.group;
      const int64_t latest = item[kPosition] + (m + kRows - 1) / s.group;
      if (begin > latest || begin + length <= in.first_key(earliest)) continue;  // none of the rows sees the block
      float weights[kRows * kBlock], decay[kRows];
      score_tile(q + m * s.dim, keys, s.dim, in.scale, weights);
      if (in.softcap > 0) soft_cap(weights, kRows * kBlock, in.softcap);
      for (int r = 0; r < kRows; ++r) {
        const int64_t position = item[kPosition] + (m + r) / s.group, seen = position + 1 - begin;
        const float before = top[m + r];
        const float sum = softmax_row(weights + r * kBlock, std::max<int64_t>(in.first_key(position) - begin, 0),
                                      std::clamp<int64_t>(seen, 0, length), top + m + r);
        decay[r] = std::exp(before - top[m + r]);
        total[m + r] = total[m + r] * decay[r] + sum;
      }
      value_tile(weights, values, decay, s.dim, value + m * s.dim);
    }
  }
  for (int64_t m = 0; m < num_queries; ++m) {
    const float share = 1 / total[m];
    for (int64_t d = 0; d < s.dim; ++d) value[m * s.dim + d] *= share;
    convert(out + row_of(m), value + m * s.dim, s.dim);
  }
}

// Rows of no sequence are zero.
template <typename T>
void clear_others(const Shape& s, const int32_t* decode_items, int64_t num_decode, const int32_t* prefill_items,
                  int64_t num_prefill, int64_t num_rows, T* out) {
  static thread_local std::vector<bool> has_item;
  has_item.assign(num_rows, false);
  for (int64_t i = 0; i < num_decode; ++i) has_item[decode_items[i * kItemFields + kRow]] = true;
  for (int64_t i = 0; i < num_prefill; ++i) {
    const int32_t* item = prefill_items + i * kItemFields;
    std::fill_n(has_item.begin() + item[kRow], item[kNumRows], true);
  }
  const int64_t size = s.heads * s.dim;
  for (int64_t row = 0; row < num_rows; ++row)
    if (!has_item[row]) std::memset(out + row * size, 0, size * sizeof(T));
}

template <typename T>
void paged_attention(const Inputs<T>& in, const int32_t* decode_items, int64_t num_decode,
                     const int32_t* prefill_items, int64_t num_prefill, T* out) {
  const Shape& s = in.shape;
  static thread_local std::vector<float> floats;
  static thread_local std::vector<Partial> partials;
  const int64_t each = s.heads * (s.dim + 2);
  floats.resize(num_decode * each);
  partials.resize(num_decode);
  for (int64_t i = 0; i < num_decode; ++i) {
    float* const mine = floats.data() + i * each;
    partials[i] = {mine, mine + s.heads, mine + 2 * s.heads};
  }
  const auto& left = partials;  // this thread's, for the helpers
  static thread_local Runs found;
  const bool by_tiles = kMultipliesTiles<T> && fits_tiles(s);
  if (by_tiles) found.find(s, decode_items, num_decode);
  const Runs& runs = found;
  const int64_t decode_heads = by_tiles ? heads_of_tile(s) : 1, num_runs = by_tiles ? runs.size() : num_decode;
  const int64_t tasks_of_decode = (s.kv_heads + decode_heads - 1) / decode_heads, prefill_tasks = num_prefill * s.kv_heads;
  // Prefill first, from the last item: its tasks are the longest, and a chunk's later rows see more.
  parallel_for(prefill_tasks + num_runs * tasks_of_decode, [&](int64_t task) {
    if (task < prefill_tasks)
      return prefill_item(in, prefill_items + (num_prefill - 1 - task / s.kv_heads) * kItemFields, task % s.kv_heads, out);
    task -= prefill_tasks;
    const int64_t index = task / tasks_of_decode, kv_head = task % tasks_of_decode * decode_heads;
    if constexpr (kMultipliesTiles<T>) {
      const int64_t num_heads = std::min(decode_heads, s.kv_heads - kv_head);
      if (by_tiles) return decode_by_tiles(in, decode_items, runs, index, kv_head, num_heads, left);
    }
    decode_item(in, decode_items + index * kItemFields, kv_head, left[index]);
  });

  // A row's items follow each other.
  static thread_local std::vector<int64_t> begins;
  begins.clear();
  for (int64_t i = 0; i < num_decode; ++i)
    if (i == 0 || decode_items[i * kItemFields + kRow] != decode_items[(i - 1) * kItemFields + kRow]) begins.push_back(i);
  begins.push_back(num_decode);
  const auto& rows = begins;
  parallel_for(rows.size() - 1, [&](int64_t i) {
    combine(in, left, rows[i], rows[i + 1], out + decode_items[rows[i] * kItemFields + kRow] * s.heads * s.dim);
  });
}

ffi::Error PagedAttention(float scale, int64_t window, int64_t chunk, float softcap, ffi::AnyBuffer q,
                          ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::Buffer<ffi::S32> tables,
                          ffi::Buffer<ffi::S32> layer_page, ffi::Buffer<ffi::S32> decode, ffi::Buffer<ffi::S32> prefill, ffi::Buffer<ffi::S32> counts,
                          ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> result) {
  const auto q_dims = q.dimensions(), kv_dims = k_pages.dimensions();
  const int64_t heads = q_dims[1], kv_heads = kv_dims[2], dim = q_dims[2];
  const Shape shape{heads, kv_heads, heads / kv_heads, dim, kv_dims[1], tables.dimensions()[1]};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto typed = [](const ffi::AnyBuffer& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
    const Inputs<T> in{shape, typed(q), typed(k_pages), typed(v_pages), tables.typed_data(), layer_page.typed_data()[0],
                       scale, window, chunk, softcap, sinks.element_count() ? sinks.typed_data() : nullptr};
    const int32_t* num_items = counts.typed_data();
    clear_others(shape, decode.typed_data(), num_items[0], prefill.typed_data(), num_items[1], q_dims[0],
                 static_cast<T*>(result->untyped_data()));
    paged_attention(in, decode.typed_data(), num_items[0], prefill.typed_data(), num_items[1],
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
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Attr<float>("softcap")
                                  .Arg<ffi::AnyBuffer>()           // q
                                  .Arg<ffi::AnyBuffer>()           // k_pages
                                  .Arg<ffi::AnyBuffer>()           // v_pages
                                  .Arg<ffi::Buffer<ffi::S32>>()   // tables
                                  .Arg<ffi::Buffer<ffi::S32>>()   // the layer's first page
                                  .Arg<ffi::Buffer<ffi::S32>>()   // decode items
                                  .Arg<ffi::Buffer<ffi::S32>>()   // prefill items
                                  .Arg<ffi::Buffer<ffi::S32>>()   // counts
                                  .Arg<ffi::Buffer<ffi::F32>>()   // sinks, none where there are none
                                  .Ret<ffi::AnyBuffer>());
