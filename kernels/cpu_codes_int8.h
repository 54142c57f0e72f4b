// Products of codes by int8 activations, cpu_byte_rows.h: by instructions that sum products of four neighbours.

#pragma once

#include "cpu_byte_rows.h"
#include "cpu_codes_int8_tiles.h"

namespace {

// Sums of products of unsigned bytes by signed ones, four neighbours to a lane, of kRun inputs at most. Where a set of
// instructions does not take all bytes, those of 4 bits: an int16 has 8 pairs of their products, 8 * 2 * 15 * 127 < 2^15.
#if defined(__AVX512VNNI__)
struct Dot {
  using Sum = __m512i;
  static constexpr bool kTakesBytes = true;
  static constexpr int64_t kRun = kStepBytes;
  static Sum add(Sum sum, Bits w, Bits x) { return _mm512_dpbusd_epi32(sum, (__m512i)w, (__m512i)x); }
  static Ints total(Sum sum) { return (Ints)sum; }
};
#elif defined(__AVX512BW__)
struct Dot {
  using Sum = __m512i;
  static constexpr bool kTakesBytes = false;  // a sum of two such products may be too large
  static constexpr int64_t kRun = 32;
  static Sum add(Sum sum, Bits w, Bits x) {
    return _mm512_add_epi16(sum, _mm512_maddubs_epi16((__m512i)w, (__m512i)x));
  }
  static Ints total(Sum sum) { return (Ints)_mm512_madd_epi16(sum, _mm512_set1_epi16(1)); }
};
#elif defined(__AVX2__)
struct Dot {
  using Sum = __m256i;
  static constexpr bool kTakesBytes = false;
  static constexpr int64_t kRun = 32;
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
  static constexpr int64_t kRun = kStepBytes;
  static Sum add(Sum sum, Bits w, Bits x) {
    for (int b = 0; b < 4; ++b) sum += (Ints)(w >> 8 * b & 255) * ((Ints)(x << (24 - 8 * b)) >> 24);
    return sum;
  }
  static Ints total(Sum sum) { return sum; }
};
#endif

// total[r][v] = sums of codes by rows x, `count` inputs of a part from where units and rows are.
template <int kBits, int kNumRows>
inline void dots(const Unit* units, const int8_t* x, int64_t step_bytes, int64_t count, Ints (*total)[kVecs]) {
  constexpr bool kInHalves = kBits == 4 || !Dot::kTakesBytes;  // a unit is used in two steps
  constexpr int kSums = kBits == 8 && kInHalves ? 2 : 1, kCodes = 32 / kBits;
  const Bits low = 0x0f0f0f0fu - Bits{};
  for (int r = 0; r < kNumRows; ++r)
    for (int v = 0; v < kVecs; ++v) total[r][v] = Ints{};
  for (int64_t k = 0; k < count;) {
    typename Dot::Sum sums[kSums][kNumRows][kVecs] = {};
    const int8_t* from = x + k / kStepBytes * step_bytes + k % kStepBytes;
    for (const int64_t stop = std::min(k + Dot::kRun, count); k < stop; k += kCodes, units += kPanel, from += kCodes) {
      __builtin_prefetch(units + kAhead * kPanel, 0, 3);
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
          std::memcpy(&four, from + r * kStepBytes + (kBits == 4 ? 4 * half : 0), sizeof four);
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
  const ByteRows x;

  template <typename In>
  Int8(const Matrix& m, const In* x, const std::vector<Row>& rows) : m(m), x(x, rows, m.inputs, part_of(m.group)) {}

  // sums[kNumRows, 16] of a panel, kColumns apart, for rows from `row` on.
  template <int kBits, int kNumRows>
  void tile(int64_t panel, int64_t row, float* sums) const {
    Vec sum[kNumRows][kVecs] = {};
    for (int64_t p = 0; p < x.parts; ++p) {
      Ints products[kNumRows][kVecs];
      dots<kBits, kNumRows>(m.unit(panel, p * x.part * kBits / 32), x.at(p, 0, row), x.step_bytes(), x.part, products);
      const float *scales = x.scales(p, row), *totals = x.totals(p, row);
      const int64_t group = p * x.part / m.group;
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = m.scale(panel, group, v), offset = m.offset(panel, group, v);
        m.fetch_floats(panel, group + kAhead * 32 / kBits / m.group);
        for (int r = 0; r < kNumRows; ++r) sum[r][v] = with_part(sum[r][v], products[r][v], scale, offset, scales[r], totals[r]);
      }
    }
    for (int r = 0; r < kNumRows; ++r)
      for (int v = 0; v < kVecs; ++v) store(sums + r * kColumns + v * kLanes, sum[r][v]);
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
    if constexpr (kHasTiles)
      if (num_rows * std::min(x.part, kStepBytes) > kBytesOfTiles && x.part % kLeastPart == 0)
        return sum_by_tiles(m, x, panel, num_panels, row, num_rows, sums);
    for (int64_t p = 0; p < num_panels; ++p)
      m.bits() == 4 ? tiles<4>(panel + p, row, num_rows, sums + p * kPanel) : tiles<8>(panel + p, row, num_rows, sums + p * kPanel);
  }
};

}  // namespace
