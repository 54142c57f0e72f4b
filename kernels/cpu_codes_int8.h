// Products of codes by int8 activations: rows of x become bytes with a scale for each part of a row, so that sums within
// a part are those of integers, which are exact.

#pragma once

#include <cstddef>
#include <numeric>
#include <vector>

#include "cpu_codes.h"

namespace {

// Sums of products of unsigned bytes by signed ones, four neighbours to a lane. Where a set of instructions does not take
// all bytes, those of 4 bits, and as many products as kRun inputs have.
#if defined(__AVX512VNNI__)
struct Dot {
  using Sum = __m512i;
  static constexpr bool kTakesBytes = true;
  static Sum add(Sum sum, Bits w, Bits x) { return _mm512_dpbusd_epi32(sum, (__m512i)w, (__m512i)x); }
  static Ints total(Sum sum) { return (Ints)sum; }
};
#elif defined(__AVX512BW__)
struct Dot {
  using Sum = __m512i;
  static constexpr bool kTakesBytes = false;  // a sum of two such products may be too large
  static Sum add(Sum sum, Bits w, Bits x) {
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
  }
  static Ints total(Sum sum) { return (Ints)_mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};
#elif defined(__AVX2__)
struct Dot {
  using Sum = __m256i;
  static constexpr bool kTakesBytes = false;
  static Sum add(Sum sum, Bits w, Bits x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    asm("" : "+x"(sum));  // else GCC adds in another order, for which the registers do not suffice
    return sum;
  }
  static Ints total(Sum sum) { return (Ints)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};
#else
struct Dot {
  using Sum = Ints;
  static constexpr bool kTakesBytes = true;
  static Sum add(Sum sum, Bits w, Bits x) {
    for (int b = 0; b < 4; ++b) sum += (Ints)(w >> 8 * b & 255) * ((Ints)(x << (24 - 8 * b)) >> 24);
    return sum;
  }
  static Ints total(Sum sum) { return sum; }
};
#endif

constexpr int64_t kRun = 32;    // inputs of a Dot. An int16 has 8 pairs of their products: 8 * 2 * 15 * 127 < 2^15
constexpr int64_t kPart = 128;  // at most inputs that share a scale, where these are many

// scale * values is x, rounded; sum is that of these.
template <typename In>
void quantise(const In* x, int64_t count, int8_t* values, float* scale, float* sum) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes), may_alias));
  Ints most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Ints size = (Ints)load_some(x + i, std::min<int64_t>(kLanes, count - i)) & 0x7fffffff;
    most = size > most ? size : most;  // as the numbers compare, and what is none is larger than all
  }
  int32_t largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
  float top;
  std::memcpy(&top, &largest, sizeof top);
  const float inverse = top > 1e-30f ? 127 / top : 0;
  Ints total{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - i);
    // To the nearest: of a float32 of this size the last place is 1.
    const Ints whole = (Ints)fma(load_some(x + i, here), splat(inverse), splat(12582912.0f)) - 0x4b400000;
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    std::memcpy(values + i, &bytes, here);
    total += whole;
  }
  int32_t in_all = 0;
  for (int i = 0; i < kLanes; ++i) in_all += total[i];
  *scale = top / 127;
  *sum = *scale * in_all;
}

// total[r][v] = sums of codes by rows x, `count` inputs from where units and rows are.
template <int kBits, int kNumRows>
__attribute__((noinline)) void dots(const Unit* units, const int8_t* const* x, int64_t count, Ints (*total)[kVecs]) {
  constexpr bool kInHalves = kBits == 4 || !Dot::kTakesBytes;  // a unit is used in two steps
  constexpr int kSums = kBits == 8 && kInHalves ? 2 : 1, kCodes = 32 / kBits;
  const Bits low = 0x0f0f0f0fu - Bits{};
  const int8_t* from[kNumRows];
  for (int r = 0; r < kNumRows; ++r) {
    from[r] = x[r];
    for (int v = 0; v < kVecs; ++v) total[r][v] = Ints{};
  }
  for (int64_t k = 0; k < count;) {
    typename Dot::Sum sums[kSums][kNumRows][kVecs] = {};
    for (const int64_t stop = std::min(k + kRun, count); k < stop; k += kCodes, units += kPanel) {
      __builtin_prefetch(units + kAhead * kPanel, 0, 2);
#pragma GCC unroll 2
      for (int half = 0; half <= kInHalves; ++half) {
        Bits w[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          const Bits unit = load_units(units + v * kLanes);
          w[v] = !kInHalves ? unit : (half == 0 ? unit : unit >> 4) & low;
        }
#pragma GCC unroll 8
        for (int r = 0; r < kNumRows; ++r) {
          uint32_t four;
          std::memcpy(&four, from[r] + k + (kBits == 4 ? 4 * half : 0), sizeof four);
          for (int v = 0; v < kVecs; ++v) {
            auto& sum = sums[kSums == 2 ? half : 0][r][v];
            sum = Dot::add(sum, w[v], four - Bits{});
          }
        }
      }
    }
    for (int r = 0; r < kNumRows; ++r)
      for (int v = 0; v < kVecs; ++v) {
        total[r][v] += Dot::total(sums[0][r][v]);
        if (kSums == 2) total[r][v] += Dot::total(sums[kSums - 1][r][v]) << 4;
      }
  }
}

struct Int8 {
  const Matrix& m;
  const int64_t part, parts;  // inputs of one, and how many a row has
  std::vector<int8_t> values;
  std::vector<float> scales, totals;

  template <typename In>
  Int8(const Matrix& m, const In* x, const std::vector<Row>& rows)
      : m(m),
        part(std::gcd(m.group, kPart) >= kRun ? std::gcd(m.group, kPart) : m.group),
        parts(m.inputs / part),
        values(rows.size() * m.inputs),
        scales(rows.size() * parts),
        totals(rows.size() * parts) {
    constexpr int64_t kTogether = 4;  // rows of a task: fewer take less time than it takes to wake a thread
    const int64_t num_rows = rows.size();
    parallel_for((num_rows + kTogether - 1) / kTogether, [&](int64_t task) {
      for (int64_t i = task * kTogether; i < std::min(num_rows, (task + 1) * kTogether); ++i)
        for (int64_t p = 0; p < parts; ++p)
          quantise(x + rows[i].from * m.inputs + p * part, part, values.data() + i * m.inputs + p * part,
                   &scales[i * parts + p], &totals[i * parts + p]);
    });
  }

  // sums[kNumRows, 16] of a panel, kColumns apart, for rows from `row` on.
  template <int kBits, int kNumRows>
  void tile(int64_t panel, int64_t row, float* sums) const {
    const int8_t* x[kNumRows];
    for (int64_t p = 0; p < parts; ++p) {
      for (int r = 0; r < kNumRows; ++r) x[r] = values.data() + (row + r) * m.inputs + p * part;
      Ints total[kNumRows][kVecs];
      dots<kBits, kNumRows>(m.unit(panel, p * part * kBits / 32), x, part, total);
      const int64_t group = p * part / m.group;
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = m.scale(panel, group, v), offset = m.offset(panel, group, v);
        for (int r = 0; r < kNumRows; ++r) {
          float* to = sums + r * kColumns + v * kLanes;
          const int64_t at = (row + r) * parts + p;
          const Vec before = p == 0 ? Vec{} : load(to);
          const Vec sum = fma(splat(scales[at]), __builtin_convertvector(total[r][v], Vec) * scale, before);
          store(to, fma(splat(totals[at]), offset, sum));
        }
      }
    }
  }

  template <int kBits>
  void tiles(int64_t panel, int64_t row, int64_t num_rows, float* sums) const {
    constexpr int kRows = kBits == 8 && !Dot::kTakesBytes ? 2 : kLanes == 16 ? 8 : 4;
    int64_t i = 0;
    for (; i + kRows <= num_rows; i += kRows) tile<kBits, kRows>(panel, row + i, sums + i * kColumns);
    for (; i + 2 <= num_rows; i += 2) tile<kBits, 2>(panel, row + i, sums + i * kColumns);
    for (; i < num_rows; ++i) tile<kBits, 1>(panel, row + i, sums + i * kColumns);
  }

  void sum(int64_t panel, int64_t num_panels, int64_t row, int64_t num_rows, float* sums) const {
    for (int64_t p = 0; p < num_panels; ++p)
      if (m.units * 8 == m.inputs) {
        tiles<4>(panel + p, row, num_rows, sums + p * kPanel);
      } else {
        tiles<8>(panel + p, row, num_rows, sums + p * kPanel);
      }
  }
};

}  // namespace
