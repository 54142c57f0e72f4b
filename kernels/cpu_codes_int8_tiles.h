// Products of codes by int8 activations on AMX: a part of 16 rows meets 16 outputs in a tile of integer sums. They are those of
// the vector instructions (cpu_codes_int8.h), and so are results, to the last bit: which of the two runs may depend on how many
// rows there are.

#pragma once

#include "cpu_byte_rows.h"
#include "cpu_gemm_tiles.h"

namespace {

constexpr int64_t kBytesOfTiles = 512;  // of rows in a step: with no more of them vectors are as fast
constexpr int64_t kInputsAtOnce = 512;  // of two panels, in L1 beside those of two row tiles

// Codes of inputs [begin, end) as tiles have them: [(end - begin) / 4, 16] of four neighbours, a byte each.
inline void spread(const Matrix& m, int64_t panel, int64_t begin, int64_t end, char* out) {
  const Bits low = 0x0f0f0f0fu - Bits{};
  const Unit* units = m.unit(panel, begin / 8);
  for (int64_t i = begin; i < end; i += 8, units += kPanel, out += 2 * kRowBytes) {
    __builtin_prefetch(units + kAhead * kPanel, 0, 2);
    for (int v = 0; v < kVecs; ++v) {
      const Bits unit = load_units(units + v * kLanes);
      reinterpret_cast<Bits*>(out)[v] = unit & low;
      reinterpret_cast<Bits*>(out + kRowBytes)[v] = unit >> 4 & low;
    }
  }
}

// By row tile and panel of a pair.
struct alignas(kCacheLine) IntegerSums {
  int32_t of[2][2][kTileRows][kPanel];
};

// Some parts of a pair of panels, from the first of these on.
struct PanelParts {
  int64_t panel, count;  // the first one's number; 1, where it stands for both
  int64_t begin, end;
  const char* tiles[2];
};

// One row tile or two, from `row` on, by a pair of panels: the products of a part.
template <int kRowTiles>
void sum_part(const ByteRows& x, int64_t part, int64_t row, const PanelParts& panels, IntegerSums& sums) {
  clear_sums<kSums>();
  if constexpr (kRowTiles == 2) clear_sums<kNextSums>();
  for (int64_t step = 0; step < x.steps; ++step) {
    const int64_t at = ((part - panels.begin) * x.part + step * kStepBytes) / 4 * kRowBytes;
    load_tile<kX>(x.at(part, step, row), kStepBytes);
    if constexpr (kRowTiles == 2) load_tile<kNextX>(x.at(part, step, row + kTileRows), kStepBytes);
    load_tile<kW>(panels.tiles[0] + at, kRowBytes);
    multiply_bytes<kSums, kX, kW>();
    if constexpr (kRowTiles == 2) multiply_bytes<kNextSums, kNextX, kW>();
    load_tile<kW + 1>(panels.tiles[1] + at, kRowBytes);
    multiply_bytes<kSums + 1, kX, kW + 1>();
    if constexpr (kRowTiles == 2) multiply_bytes<kNextSums + 1, kNextX, kW + 1>();
  }
  store_tile<kSums>(sums.of[0][0], kRowBytes);
  store_tile<kSums + 1>(sums.of[0][1], kRowBytes);
  if constexpr (kRowTiles == 2) {
    store_tile<kNextSums>(sums.of[1][0], kRowBytes);
    store_tile<kNextSums + 1>(sums.of[1][1], kRowBytes);
  }
}

// What a part adds to the sums of a panel, kColumns apart, for rows from `row` on.
inline void add_part(const Matrix& m, const ByteRows& x, int64_t part, int64_t panel, int64_t row, int64_t num_rows,
                     const int32_t (*products)[kPanel], float* sums) {
  const float *scales = x.scales(part, row), *totals = x.totals(part, row);
  const int64_t group = part * x.part / m.group;
  for (int v = 0; v < kVecs; ++v) {
    const Vec scale = m.scale(panel, group, v), offset = m.offset(panel, group, v);
    for (int64_t r = 0; r < num_rows; ++r) {
      float* to = sums + r * kColumns + v * kLanes;
      const Ints here = *reinterpret_cast<const Ints*>(products[r] + v * kLanes);
      store(to, with_part(part == 0 ? Vec{} : load(to), here, scale, offset, scales[r], totals[r]));
    }
  }
}

// Adds the products of one row tile or two. The tiles of a part are multiplied while vectors add the part before.
template <int kRowTiles>
void sum_parts(const Matrix& m, const ByteRows& x, const PanelParts& panels, int64_t row, int64_t num_rows, float* sums) {
  const int64_t heights[] = {std::min<int64_t>(num_rows, kTileRows), std::max<int64_t>(num_rows - kTileRows, 1)};
  TileShapes shapes;
  for (const int t : {kSums, kSums + 1, kX}) shapes.rows[t] = heights[0];
  for (const int t : {kNextSums, kNextSums + 1, kNextX}) shapes.rows[t] = heights[1];
  const int64_t bytes = std::min(x.part, kStepBytes);
  for (const int t : {kX, kNextX}) shapes.bytes[t] = bytes;
  for (const int t : {kW, kW + 1}) shapes.rows[t] = bytes / 4;
  shape_tiles(shapes);
  IntegerSums products[2];
  for (int64_t part = panels.begin; part <= panels.end; ++part) {
    if (part < panels.end) sum_part<kRowTiles>(x, part, row, panels, products[part % 2]);
    if (part == panels.begin) continue;
    for (int tile = 0; tile < kRowTiles; ++tile)
      for (int64_t p = 0; p < panels.count; ++p)
        add_part(m, x, part - 1, panels.panel + p, row + tile * kTileRows, heights[tile], products[(part - 1) % 2].of[tile][p],
                 sums + tile * kTileRows * kColumns + p * kPanel);
  }
}

// sums[num_rows, kColumns] = rows from `row` on by panels from `panel` on. Parts are kLeastPart inputs, or whole steps.
inline void sum_by_tiles(const Matrix& m, const ByteRows& x, int64_t panel, int64_t num_panels, int64_t row, int64_t num_rows,
                         float* sums) {
  alignas(kCacheLine) char made[2][kInputsAtOnce / 4 * kRowBytes];
  const int64_t at_once = kInputsAtOnce / x.part;
  for (int64_t p = 0; p < num_panels; p += 2)
    for (int64_t begin = 0; begin < x.parts; begin += at_once) {
      PanelParts panels = {panel + p, std::min<int64_t>(2, num_panels - p), begin, std::min(begin + at_once, x.parts)};
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t from = panels.panel + std::min(i, panels.count - 1), first = begin * x.part;
        if (m.bits() == 4) spread(m, from, first, panels.end * x.part, made[i]);
        panels.tiles[i] = m.bits() == 4 ? made[i] : reinterpret_cast<const char*>(m.unit(from, first / 4));
      }
      for (int64_t i = 0; i < num_rows; i += 2 * kTileRows) {
        const int64_t here = std::min<int64_t>(num_rows - i, 2 * kTileRows);
        const auto sum = here > kTileRows ? sum_parts<2> : sum_parts<1>;
        sum(m, x, panels, row + i, here, sums + i * kColumns + p * kPanel);
      }
    }
  release_tiles();
}

}  // namespace
