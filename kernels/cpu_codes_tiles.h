// Products by codes on AMX in bfloat16: tiles of weights are made in a core's first cache, each as the dense bfloat16 matrix has
// it, so that results are those of cpu_gemm_tiles.h to the last bit, for a third of what is read from memory.

#pragma once

#include "cpu_codes.h"
#include "cpu_gemm_tiles.h"

namespace {

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

// A step of a panel as a tile, with zeros behind K.
template <int kBits>
void make_tile(const Matrix& m, int64_t panel, int64_t step, float* out) {
  constexpr int kCodes = 32 / kBits;
  const int64_t end = std::min((step + 1) * kStepInputs, m.inputs);
  const Unit* units = m.unit(panel, step * kStepInputs / kCodes);
  float* const tile_end = out + kTileDepth * kPanel;
  // Where this panel's end is near, its place in the next pair is fetched.
  const int64_t ahead = step * kStepInputs / kCodes + kAhead < m.units ? kAhead : kAhead + m.units;
  for (int64_t k = step * kStepInputs; k < end;) {
    const int64_t group = k / m.group, stop = std::min(end, (group + 1) * m.group);
    Vec scale[kVecs], offset[kVecs];
    for (int v = 0; v < kVecs; ++v) scale[v] = m.scale(panel, group, v), offset[v] = m.offset(panel, group, v);
    m.fetch_floats(panel, group + ahead * kCodes / m.group);
    for (; k < stop; k += kCodes, units += kPanel, out += kCodes / 2 * kPanel) {
      __builtin_prefetch(units + ahead * kPanel, 0, 3);
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
  std::fill(out, tile_end, 0.0f);
}

// Two panels, of whose steps the last kMadeSteps are there.
class CodedPair {
 public:
  static constexpr bool kLieReady = false;  // what they are made of is fetched as it is read

  CodedPair(const Matrix& m, int64_t first, int64_t second, char* made) : m_(m), panels_{first, second}, made_(made) {}

  const char* at(int panel, int64_t step) const { return made_ + (step % kMadeSteps * 2 + panel) * kTileBytes; }
  void make(int64_t step) const {
    for (int i = 0; i < 2; ++i) {
      float* const to = reinterpret_cast<float*>(made_ + (step % kMadeSteps * 2 + i) * kTileBytes);
      m_.bits() == 4 ? make_tile<4>(m_, panels_[i], step, to) : make_tile<8>(m_, panels_[i], step, to);
    }
  }

 private:
  const Matrix& m_;
  int64_t panels_[2];
  char* made_;
};

struct CodedPanels {
  const Matrix& m;
  int64_t inputs, outputs, count;

  explicit CodedPanels(const Matrix& m) : m(m), inputs(m.inputs), outputs(m.outputs), count(m.panels) {}

  int64_t num_bytes() const { return m.units * kPanel * sizeof(Unit); }
  const char* at(int64_t) const { return nullptr; }
  using Pair = CodedPair;
  CodedPair pair(int64_t panel, char* made) const { return {m, panel, std::min(panel + 1, count - 1), made}; }
};

}  // namespace
