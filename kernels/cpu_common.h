// What the native CPU kernels share: vectors as wide as the processor's, bfloat16, and a parallel loop (cpu_parallel.h).

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu_parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;  // wider vectors than the processor's would spill
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(2), may_alias));

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec load(const BFloat16* p) {
#ifdef __AVX512F__  // GCC 12 makes several instructions of the conversion
  return (Vec)((Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#else
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
#endif
}
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
// bfloat16 in the upper halves, to the nearest, ties to even; the lower ones are anything.
inline Bits to_upper_halves(Vec v) {
  const Bits bits = (Bits)v;
  return bits + 0x7fff + (bits >> 16 & 1);
}
inline void store(BFloat16* p, Vec v) {
  const Bits rounded = to_upper_halves(v) >> 16;
#ifdef __AVX512F__  // GCC 12 takes a shuffle with zeros
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(rounded, Halves);
#endif
}
// The first `count` lanes; the others of what is loaded are 0.
template <typename T>
inline Vec load_some(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count == kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

inline Vec max_of(Vec a, Vec b) { return a > b ? a : b; }

#ifdef __AVX512F__
inline float sum_of(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
inline float max_of(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
inline int32_t sum_of(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }
inline int32_t max_of(Ints v) { return _mm512_reduce_max_epi32((__m512i)v); }
#else
template <typename V>
inline auto sum_of(V v) {
  decltype(v[0] + v[0]) sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
template <typename V>
inline auto max_of(V v) {
  auto best = v[0];
  for (int i = 1; i < kLanes; ++i) best = std::max(best, v[i]);
  return best;
}
#endif

// exp(x) for x <= 0, to 2 units in the last place (the polynomial is that of Cephes' expf); never less than exp(-87).
inline Vec exp_of_negative(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);  // towards zero, so to the nearest
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // the logarithm of 2 in two parts
  Vec p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  return (Vec)((Ints)(p * r * r + r + 1.0f) + (n << 23));
}

// out[i] = x[i], converted.
template <typename To, typename From>
void convert(To* out, const From* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  if (i < count) store_some(out + i, load_some(x + i, count - i), count - i);
}

}  // namespace
