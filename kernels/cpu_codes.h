// Matrices of codes of 4 or 8 bits, as products read them.
//
// A weight is code * scale + offset; as many neighbours along K as make a group share the latter two. A panel holds 16
// outputs: [units, 16] of codes, and [groups, 16] of scales and of offsets. A unit of 32 bits is eight codes of an
// output: its byte b holds that of input b in the low half, and of input 4 + b in the high one. Or it is four codes of
// 8 bits. So four neighbours along K are the bytes of a unit, or halves of them, as instructions that sum four products
// want them.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <vector>

#include "cpu_panels.h"

namespace {

constexpr int64_t kWide = 4;       // panels of a task
constexpr int64_t kColumns = kWide * kPanel;
constexpr int64_t kChunk = 96;     // most rows of a task,
constexpr int64_t kBlock = 16;     // so many at once
constexpr int64_t kAhead = 40;     // units that are under way from memory
typedef uint32_t __attribute__((may_alias)) Unit;

// a * b + c, in one step where the processor has one: compilers may choose for one loop otherwise than for another, and
// the sums of a few rows are those of many to the last bit.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

struct Half {
  uint16_t bits;
};

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // The exponent's offset is 127 instead of 15. Numbers below the normal ones get a leading one, which is taken off again.
  const Bits half = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits);
  const Bits size = ((half & 0x7fff) << 13) + (112u << 23);
  const Vec tiny = (Vec)(size + (1u << 23)) - 6.103515625e-05f;
  return (Vec)(((half & 0x7c00) != 0 ? size : (Bits)tiny) | (half & 0x8000) << 16);
#endif
}

// Of two types.
struct Floats {
  const void* data;
  bool are_halves;
  Vec at(int64_t i) const {
    return are_halves ? load(static_cast<const Half*>(data) + i) : load(static_cast<const float*>(data) + i);
  }
  void fetch(int64_t i) const {
    __builtin_prefetch(static_cast<const char*>(data) + i * (are_halves ? sizeof(Half) : sizeof(float)));
  }
};

struct Matrix {
  const Unit* codes;
  Floats scales, offsets;
  float factor;  // of the offsets
  int64_t inputs, outputs, panels, units, groups;
  int64_t group;  // inputs of one

  int bits() const { return units * 8 == inputs ? 4 : 8; }
  Vec scale(int64_t panel, int64_t group, int v) const {
    return scales.at((panel * groups + group) * kPanel + v * kLanes);
  }
  Vec offset(int64_t panel, int64_t group, int v) const {
    return factor * offsets.at((panel * groups + group) * kPanel + v * kLanes);
  }
  // May be behind the last group of the panel, or of all.
  void fetch_floats(int64_t panel, int64_t group) const {
    scales.fetch((panel * groups + group) * kPanel);
    offsets.fetch((panel * groups + group) * kPanel);
  }
  const Unit* unit(int64_t panel, int64_t i) const { return codes + (panel * units + i) * kPanel; }
};

inline Bits load_units(const Unit* p) { return *reinterpret_cast<const Bits*>(p); }

}  // namespace
