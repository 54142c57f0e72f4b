// Products by codes on AMX in bfloat16: tiles of weights are made in a core's caches, each as the dense bfloat16 matrix has it, so
// that results are those of cpu_gemm_tiles.h to the last bit, for a third of what is read from memory.

#pragma once

#include "cpu_codes.h"
#include "cpu_gemm_tiles.h"

namespace {

constexpr int64_t kTilesAhead = 40;  // units that are under way from memory

// Two neighbours along K: bfloat16 in the halves of 32 bits, the first in the lower.
inline Bits pair_of(Vec first, Vec second) {
#ifdef __AMX_BF16__  // whose processors have AVX-512 with bfloat16
  alignas(64) static constexpr uint16_t kTurns[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Bits)_mm512_permutexvar_epi16(_mm512_load_si512(kTurns), both);
#else
  return to_upper_halves(first) >> 16 | (to_upper_halves(second) & 0xffff0000u);
#endif
}

// The code in the lowest bits, as a number.
template <int kBits>
inline Vec number_of(Bits codes) {
#ifdef __AMX_BF16__  // one instruction looks a code of four bits up, and leaves the others out
  if constexpr (kBits == 4) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec)_mm512_permutexvar_ps((__m512i)codes, numbers);
  }
#endif
  return __builtin_convertvector((Ints)(codes & ((1u << kBits) - 1)), Vec);
}

// Tiles of a panel, [inputs / 2, 16] pairs.
template <int kBits>
void make_tiles(const Matrix& m, int64_t panel, float* out) {
  constexpr int kCodes = 32 / kBits;
  const Unit* units = m.unit(panel, 0);
  for (int64_t group = 0; group < m.groups; ++group) {
    Vec scale[kVecs], offset[kVecs];
    for (int v = 0; v < kVecs; ++v) scale[v] = m.scale(panel, group, v), offset[v] = m.offset(panel, group, v);
    for (int64_t k = 0; k < m.group; k += kCodes, units += kPanel, out += kCodes / 2 * kPanel) {
      __builtin_prefetch(units + kTilesAhead * kPanel, 0, 2);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const Bits unit = load_units(units + v * kLanes);
        const auto weight = [&](int i) {
          return fma(number_of<kBits>(unit >> (i % 4 * 8 + i / 4 * 4)), scale[v], offset[v]);
        };
#pragma GCC unroll 4
        for (int i = 0; i < kCodes; i += 2) store(out + i / 2 * kPanel + v * kLanes, (Vec)pair_of(weight(i), weight(i + 1)));
      }
    }
  }
}

struct CodedPanels {
  const Matrix& m;
  int64_t inputs, outputs, count;

  explicit CodedPanels(const Matrix& m) : m(m), inputs(m.inputs), outputs(m.outputs), count(m.panels) {}

  int64_t num_bytes() const { return m.units * kPanel * sizeof(Unit); }
  const char* at(int64_t) const { return nullptr; }
  static constexpr bool kLieReady = false;  // what they are made of is fetched as it is read
  PanelPair pair(int64_t panel, char* made) const {
    const int64_t depth = (inputs + 1) / 2, panel_bytes = (depth + kTileDepth - 1) / kTileDepth * kTileBytes;
    for (int64_t i = 0; i < 2; ++i) {
      float* const to = reinterpret_cast<float*>(made + i * panel_bytes);
      const int64_t from = std::min(panel + i, count - 1);
      m.units * 8 == inputs ? make_tiles<4>(m, from, to) : make_tiles<8>(m, from, to);
    }
    return {made, made + panel_bytes, depth};
  }
};

}  // namespace
