// What products by panels of 16 outputs share: the rows that are wanted, and the gates that they end with.

#pragma once

#include <type_traits>

#include "cpu_common.h"

namespace {

constexpr int kPanel = 16;
constexpr int kVecs = kPanel / kLanes;  // vectors of a panel

// A row of y and the row of x that it is made of.
struct Row {
  int32_t to, from;
};

enum class Gate { kNone, kSilu, kGeluTanh };

// a / b, for what becomes an Out: of bfloat16 to 2 units of float32's last place, which takes half as long.
template <typename Out>
inline Vec quotient(Vec a, Vec b) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Out, BFloat16>) {
    const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)b);
    return a * (inverse * (2.0f - b * inverse));
  }
#endif
  return a / b;
}

// out[c] = activation(gate) * value, of `count` outputs. Both activations are gate * sigmoid(z): z is the gate itself for
// SiLU, and 2 sqrt(2 / pi) (gate + 0.044715 gate^3) for GELU with tanh, as tanh(z / 2) = 2 sigmoid(z) - 1.
template <typename Out>
void gated(const float* sums, int64_t count, Gate gate, Out* out) {
  for (int64_t begin = 0; begin < count; begin += kLanes, sums += 2 * kLanes) {
#ifdef __AVX512F__  // two panels, if there is another, make one vector of gates and one of values
    const float* next = begin + kLanes / 2 < count ? sums + kPanel : sums;
    const auto halves = [](const float* low, const float* high) {
      return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
    };
    const Vec g = halves(sums, next), value = halves(sums + kPanel / 2, next + kPanel / 2);
#else
    const Vec g = load(sums), value = load(sums + kPanel / 2);
#endif
    const Vec z = gate == Gate::kSilu ? g : 1.59576912f * (g + 0.044715f * g * g * g);
    const Vec e = exp_of_negative(z < 0 ? z : -z);
    const Vec sigmoid = quotient<Out>(z < 0 ? e : splat(1.0f), 1.0f + e);
    store_some(out + begin, g * sigmoid * value, std::min<int64_t>(kLanes, count - begin));
  }
}

// A row of y, its outputs from that of `panel` on, from the sums of panels: as many as lie there of `outputs` in all.
template <typename Out>
void finish(const float* sums, int64_t num_panels, int64_t panel, int64_t outputs, Gate gate, Out* y) {
  const int64_t each = gate == Gate::kNone ? kPanel : kPanel / 2, column = panel * each;
  const int64_t count = std::min(num_panels * each, outputs - column);
  if (gate == Gate::kNone) {
    convert(y + column, sums, count);
  } else {
    gated(sums, count, gate, y + column);
  }
}

}  // namespace
