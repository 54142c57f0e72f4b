// Rows of x as bytes with a scale for each part of a row, so that sums within a part are those of integers, which are exact.

#pragma once

#include <cstddef>
#include <numeric>
#include <vector>

#include "cpu_codes.h"

namespace {

constexpr int64_t kStepBytes = 64;  // of a row, that lie together
constexpr int64_t kPart = 128;      // at most inputs that share a scale, where these are many
constexpr int64_t kLeastPart = 32;

// Inputs that share a scale of a row: those of a group of codes, or as many of them as divide it.
inline int64_t part_of(int64_t group) {
  const int64_t divisor = std::gcd(group, kPart);
  return divisor >= kLeastPart ? divisor : group;
}

// scale * values is x, rounded; sum is that of these. From kStepBytes of values to the next are step_bytes.
template <typename In>
void quantise(const In* x, int64_t count, int8_t* values, int64_t step_bytes, float* scale, float* sum) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes), may_alias));
  Ints most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints size = (Ints)load_some(x + i, std::min<int64_t>(kLanes, count - i)) & 0x7fffffff;
    most = size > most ? size : most;  // as the numbers compare, and what is none is larger than all
  }
  const int32_t largest = max_of(most);
  float top;
  std::memcpy(&top, &largest, sizeof top);
  const float inverse = top > 1e-30f ? 127 / top : 0;
  Ints total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    // To the nearest: of a float32 of this size the last place is 1.
    const Ints whole = (Ints)fma(load_some(x + i, here), splat(inverse), splat(12582912.0f)) - 0x4b400000;
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    std::memcpy(values + i / kStepBytes * step_bytes + i % kStepBytes, &bytes, here);
    total += whole;
  }
  *scale = top / 127;
  *sum = *scale * sum_of(total);
}

// Rows as bytes, [parts, steps, rows, kStepBytes]: a step is kStepBytes of a part's inputs, or what a part has. Each part of a
// row has a scale, and the sum of what its bytes stand for: [parts, rows].
class ByteRows {
 public:
  template <typename In>
  ByteRows(const In* x, const std::vector<Row>& rows, int64_t inputs, int64_t part)
      : part(part),
        parts(inputs / part),
        steps((part + kStepBytes - 1) / kStepBytes),
        num_rows_(rows.size()),
        values_(parts * steps * num_rows_ * kStepBytes),
        scales_(parts * num_rows_),
        totals_(parts * num_rows_) {
    constexpr int64_t kTogether = 4;  // rows of a task: fewer take less time than it takes to wake a thread
    parallel_for((num_rows_ + kTogether - 1) / kTogether, [&](int64_t task) {
      for (int64_t row = task * kTogether; row < std::min(num_rows_, (task + 1) * kTogether); ++row)
        for (int64_t p = 0; p < parts; ++p)
          quantise(x + rows[row].from * inputs + p * part, part, values_.data() + place(p, 0, row), step_bytes(),
                   &scales_[p * num_rows_ + row], &totals_[p * num_rows_ + row]);
    });
  }

  const int64_t part, parts;  // inputs of one, and how many a row has
  const int64_t steps;        // of a part

  int64_t step_bytes() const { return num_rows_ * kStepBytes; }
  const int8_t* at(int64_t p, int64_t step, int64_t row) const { return values_.data() + place(p, step, row); }
  const float* scales(int64_t p, int64_t row) const { return scales_.data() + p * num_rows_ + row; }
  const float* totals(int64_t p, int64_t row) const { return totals_.data() + p * num_rows_ + row; }

 private:
  int64_t place(int64_t p, int64_t step, int64_t row) const { return (p * steps + step) * step_bytes() + row * kStepBytes; }

  const int64_t num_rows_;
  std::vector<int8_t> values_;
  std::vector<float> scales_, totals_;
};

// A sum and what a part adds: products of its bytes by codes, and by the offset.
inline Vec with_part(Vec before, Ints products, Vec scale, Vec offset, float row_scale, float row_total) {
  const Vec sum = fma(splat(row_scale), __builtin_convertvector(products, Vec) * scale, before);
  return fma(splat(row_total), offset, sum);
}

}  // namespace
