// The few AVX-512 instructions of the kernels that are tested, in plain C++: in place of the compiler's header of this name,
// for processors that have none of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float __m256 __attribute__((vector_size(32), aligned(4), may_alias));
typedef long long __m256i __attribute__((vector_size(32), aligned(1), may_alias));
typedef float __m512 __attribute__((vector_size(64), aligned(4), may_alias));
typedef long long __m512i __attribute__((vector_size(64), aligned(1), may_alias));

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Lane>
struct Lanes {
  Lane of[64 / sizeof(Lane)];
};

inline __m256 _mm256_loadu_ps(const float* p) { return *reinterpret_cast<const __m256*>(p); }
inline __m256i _mm256_loadu_si256(const __m256i* p) { return *p; }
inline void _mm256_storeu_si256(__m256i* p, __m256i x) { *p = x; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_set1_epi16(short x) {
  Lanes<int16_t> all;
  for (auto& lane : all.of) lane = x;
  return bits_as<__m512i>(all);
}
inline __m512 _mm512_castps256_ps512(__m256 low) {
  __m512 out{};
  std::memcpy(&out, &low, sizeof low);
  return out;
}
inline __m512 _mm512_insertf32x8(__m512 into, __m256 half, int place) {
  std::memcpy(reinterpret_cast<char*>(&into) + 32 * place, &half, sizeof half);
  return into;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  uint16_t from[16];
  Lanes<uint32_t> to;
  std::memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) to.of[i] = from[i];
  return bits_as<__m512i>(to);
}
inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
  const auto from = bits_as<Lanes<uint32_t>>(x);
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from.of[i]);
  __m256i out;
  std::memcpy(&out, to, sizeof out);
  return out;
}
// To 14 bits on a processor, where the callers' next step makes up for it.
inline __m512 _mm512_rcp14_ps(__m512 x) { return 1 / x; }
inline __m512 _mm512_cvtph_ps(__m256i x) {
  uint16_t from[16];
  Lanes<float> to;
  std::memcpy(from, &x, sizeof from);
  for (int i = 0; i < 16; ++i) {
    const int exponent = from[i] >> 10 & 31, fraction = from[i] & 1023;
    const float size = std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
    to.of[i] = from[i] & 0x8000 ? -size : size;
  }
  return bits_as<__m512>(to);
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
inline float _mm512_reduce_add_ps(__m512 x) {
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += x[i];
  return sum;
}
inline float _mm512_reduce_max_ps(__m512 x) {
  float most = x[0];
  for (int i = 1; i < 16; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
inline int _mm512_reduce_add_epi32(__m512i x) {
  const auto lanes = bits_as<Lanes<int32_t>>(x);
  int sum = 0;
  for (int i = 0; i < 16; ++i) sum += lanes.of[i];
  return sum;
}
inline int _mm512_reduce_max_epi32(__m512i x) {
  const auto lanes = bits_as<Lanes<int32_t>>(x);
  int most = lanes.of[0];
  for (int i = 1; i < 16; ++i) most = lanes.of[i] > most ? lanes.of[i] : most;
  return most;
}
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  auto x = bits_as<Lanes<uint16_t>>(a), y = bits_as<Lanes<uint16_t>>(b);
  for (int i = 0; i < 32; ++i) x.of[i] += y.of[i];
  return bits_as<__m512i>(x);
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  const auto x = bits_as<Lanes<uint8_t>>(a);
  const auto y = bits_as<Lanes<int8_t>>(b);
  Lanes<int16_t> sums;
  for (int i = 0; i < 32; ++i) {
    const int sum = x.of[2 * i] * y.of[2 * i] + x.of[2 * i + 1] * y.of[2 * i + 1];
    sums.of[i] = sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum;
  }
  return bits_as<__m512i>(sums);
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = bits_as<Lanes<int16_t>>(a), y = bits_as<Lanes<int16_t>>(b);
  Lanes<int32_t> sums;
  for (int i = 0; i < 16; ++i) sums.of[i] = x.of[2 * i] * y.of[2 * i] + x.of[2 * i + 1] * y.of[2 * i + 1];
  return bits_as<__m512i>(sums);
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  auto sums = bits_as<Lanes<int32_t>>(sum);
  const auto x = bits_as<Lanes<uint8_t>>(a);
  const auto y = bits_as<Lanes<int8_t>>(b);
  for (int i = 0; i < 64; ++i) sums.of[i / 4] += x.of[i] * y.of[i];
  return bits_as<__m512i>(sums);
}
