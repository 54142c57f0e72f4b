// AMX: eight registers that hold a tile each, up to 16 rows of 64 bytes, and products of two tiles of bfloat16 or bytes. Beside
// the instructions stands what they do in plain C++, for tests of the kernels on processors that have none.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "cpu_common.h"

namespace {

#if defined(__AMX_BF16__) || defined(JAXSERVE_EMULATED_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

constexpr int kNumTiles = 8;
constexpr int kTileRows = 16;
constexpr int kRowBytes = 64;     // 16 float32, or 32 bfloat16
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kTileDepth = 16;    // pairs of bfloat16 in a row: what a product of tiles sums

// The operand of ldtilecfg (Intel's manual, volume 1, 18.2): how many rows and bytes of a row each register has.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // All of 64 bytes, and full but for those that are told otherwise.
  TileShapes() {
    for (int t = 0; t < kNumTiles; ++t) bytes[t] = kRowBytes, rows[t] = kTileRows;
  }
};

// Sets the shapes of a thread's registers. Until release_tiles the thread's tiles are saved whenever it is switched.
void shape_tiles(const TileShapes& shapes);
void release_tiles();
template <int kTile> void clear_tile();
// Rows are `stride` bytes apart.
template <int kTile> void load_tile(const void* from, int64_t stride);
// The same for what is read once: it is to leave the caches early.
template <int kTile> void load_tile_once(const void* from, int64_t stride);
template <int kTile> void store_tile(void* to, int64_t stride);
// sums[m, n] += x[m, 2 k] * w[k, n, 0] + x[m, 2 k + 1] * w[k, n, 1] for all k.
template <int kSums, int kX, int kW> void multiply_tiles();
// Of integers: sums[m, n] += x[m, 4 k + b] * w[k, n, b] for all k and the four bytes b, signed in x, unsigned in w.
template <int kSums, int kX, int kW> void multiply_bytes();

#ifdef __AMX_BF16__

// GCC's intrinsics paste the text of their arguments, which are none of a template's. The compiler does not know that these
// use tile registers; nobody else does.
inline void shape_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release_tiles() { asm volatile("tilerelease"); }
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
inline void load_tile_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}
template <int kSums, int kX, int kW>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}
template <int kSums, int kX, int kW>
inline void multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
}

#else

// A thread's registers. What hardware refuses with a fault ends the process: registers without shapes, and operands of
// different numbers of rows.
struct EmulatedTiles {
  bool shaped = false;
  TileShapes shapes;
  alignas(64) uint32_t values[kNumTiles][kTileRows][kTileDepth];
};
thread_local EmulatedTiles emulated;

inline void demand(bool condition) {
  if (!condition) std::abort();
}
// Numbers below the normal ones are 0, in operands and in all that comes of them.
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void shape_tiles(const TileShapes& shapes) {
  emulated.shaped = true;
  emulated.shapes = shapes;
  std::memset(emulated.values, 0, sizeof emulated.values);
}
inline void release_tiles() { emulated.shaped = false; }
template <int kTile>
void clear_tile() {
  demand(emulated.shaped);
  std::memset(emulated.values[kTile], 0, kTileBytes);
}
template <int kTile>
void load_tile(const void* from, int64_t stride) {
  clear_tile<kTile>();
  for (int row = 0; row < emulated.shapes.rows[kTile]; ++row)
    std::memcpy(emulated.values[kTile][row], static_cast<const char*>(from) + row * stride, emulated.shapes.bytes[kTile]);
}
template <int kTile>
void load_tile_once(const void* from, int64_t stride) {
  load_tile<kTile>(from, stride);
}
template <int kTile>
void store_tile(void* to, int64_t stride) {
  demand(emulated.shaped);
  for (int row = 0; row < emulated.shapes.rows[kTile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, emulated.values[kTile][row], kRowBytes);
}
// One instruction sums the products of even inputs and those of odd ones, each from zero and in order, and adds both to what
// was there. So hardware does, to the bit in 300,000 sums of ordinary and of subnormal numbers.
template <int kSums, int kX, int kW>
void multiply_tiles() {
  const auto& shapes = emulated.shapes;
  demand(emulated.shaped && shapes.rows[kSums] == shapes.rows[kX] && shapes.rows[kW] == kTileDepth);
  for (int m = 0; m < shapes.rows[kSums]; ++m) {
    float even[kTileDepth] = {}, odd[kTileDepth] = {};
    for (int k = 0; k < kTileDepth; ++k) {
      const uint32_t x = emulated.values[kX][m][k];
      const float x_even = flushed(as_float(x << 16)), x_odd = flushed(as_float(x & 0xffff0000u));
      for (int n = 0; n < kTileDepth; ++n) {
        const uint32_t w = emulated.values[kW][k][n];
        even[n] = flushed(std::fma(x_even, flushed(as_float(w << 16)), even[n]));
        odd[n] = flushed(std::fma(x_odd, flushed(as_float(w & 0xffff0000u)), odd[n]));
      }
    }
    for (int n = 0; n < kTileDepth; ++n) {
      uint32_t& place = emulated.values[kSums][m][n];
      const float sum = flushed(flushed(as_float(place)) + flushed(even[n] + odd[n]));
      std::memcpy(&place, &sum, sizeof sum);
    }
  }
}
template <int kSums, int kX, int kW>
void multiply_bytes() {
  const auto& shapes = emulated.shapes;
  demand(emulated.shaped && shapes.rows[kSums] == shapes.rows[kX] && shapes.rows[kW] * 4 == shapes.bytes[kX]);
  for (int m = 0; m < shapes.rows[kSums]; ++m)
    for (int k = 0; k < shapes.rows[kW]; ++k)
      for (int n = 0; n < kTileDepth; ++n)
        for (int b = 0; b < 32; b += 8) {
          const int32_t x = static_cast<int8_t>(emulated.values[kX][m][k] >> b);
          emulated.values[kSums][m][n] += x * static_cast<int32_t>(emulated.values[kW][k][n] >> b & 255);
        }
}

#endif

}  // namespace
