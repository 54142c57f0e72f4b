// A tile in memory, of 16 x 16 values of 32 bits, and how it is turned.

#pragma once

#include "cpu_tiles.h"

namespace {

struct alignas(kRowBytes) Tile {
  uint32_t bits[kTileRows][kTileDepth];

  float* row(int64_t i) { return reinterpret_cast<float*>(bits[i]); }
};

typedef uint32_t TileRow __attribute__((vector_size(kRowBytes), may_alias));
typedef int32_t TileLanes __attribute__((vector_size(kRowBytes)));
#ifdef __clang__
#define JAXSERVE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define JAXSERVE_SHUFFLE(a, b, ...) (TileRow) __builtin_shuffle(a, b, TileLanes{__VA_ARGS__})
#endif
#define JAXSERVE_EACH_LANE(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)

// Swaps what lies `kHalf` rows below and to the left with what lies as far above and to the right.
template <int kHalf>
inline void swap_halves(TileRow* rows) {
#define JAXSERVE_UPPER(lane) (((lane) & kHalf) ? kTileRows + (lane)-kHalf : (lane))
#define JAXSERVE_LOWER(lane) (((lane) & kHalf) ? kTileRows + (lane) : (lane) + kHalf)
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    if (i & kHalf) continue;
    const TileRow a = rows[i], b = rows[i + kHalf];
    rows[i] = JAXSERVE_SHUFFLE(a, b, JAXSERVE_EACH_LANE(JAXSERVE_UPPER));
    rows[i + kHalf] = JAXSERVE_SHUFFLE(a, b, JAXSERVE_EACH_LANE(JAXSERVE_LOWER));
  }
#undef JAXSERVE_UPPER
#undef JAXSERVE_LOWER
}

inline void transpose(Tile& tile) {
  TileRow rows[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) rows[i] = *reinterpret_cast<const TileRow*>(tile.bits[i]);
  swap_halves<8>(rows);
  swap_halves<4>(rows);
  swap_halves<2>(rows);
  swap_halves<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) *reinterpret_cast<TileRow*>(tile.bits[i]) = rows[i];
}

#undef JAXSERVE_SHUFFLE
#undef JAXSERVE_EACH_LANE

}  // namespace
