// y[T, N] = x[T, K] @ w[N, K]^T on a CPU, with weights that are codes of 4 or 8 bits in memory.
//
// Codes become float32 weights, for a few rows in registers, for more a block at a time in the L1 cache, and the result
// is that of the same weights in cpu_gemm.cc, to the last bit; in bfloat16 on AMX see cpu_codes_tiles.h. Or rows of x become
// int8, and meet the codes themselves: see cpu_codes_int8.h.
//
// Either way every sum runs over K in one order, whatever the number of rows: a row's result does not depend on its
// batch-mates. Only rows that are asked for are computed, and a product may end with a gate, as in cpu_gemm.cc.

#include <array>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "cpu_codes.h"
#include "cpu_codes_int8.h"
#include "cpu_codes_tiles.h"

namespace {

constexpr int64_t kNearAhead = 16;  // units that are under way from memory, by panels side by side

// Of 4 bits the codes of a unit are in the low halves of its bytes first.
template <int kBits>
inline Vec weight(Bits unit, int i, Vec scale, Vec offset) {
  const Ints code = (Ints)(unit >> (i % 4 * 8 + i / 4 * 4) & ((1u << kBits) - 1));
  return fma(__builtin_convertvector(code, Vec), scale, offset);
}

// sums[kNumRows, kColumns] = rows x times kNumPanels panels, whose weights are in registers only.
template <int kBits, int kNumRows, int kNumPanels>
void few(const Matrix& m, int64_t panel, const float* const* x, float* sums) {
  constexpr int kCodes = 32 / kBits, kWidth = kNumPanels * kVecs;
  const float* from[kNumRows];
  for (int r = 0; r < kNumRows; ++r) from[r] = x[r];
  Vec sum[kNumRows][kWidth] = {};
  const Unit* units = m.unit(panel, 0);
  int64_t k = 0;
  for (int64_t group = 0; group < m.groups; ++group) {
    Vec scale[kWidth], offset[kWidth];
    for (int v = 0; v < kWidth; ++v) {
      scale[v] = m.scale(panel + v / kVecs, group, v % kVecs);
      offset[v] = m.offset(panel + v / kVecs, group, v % kVecs);
    }
    for (const int64_t stop = k + m.group; k < stop; k += kCodes, units += kPanel) {
      Bits unit[kWidth];
      for (int v = 0; v < kWidth; ++v) {
        const Unit* here = units + v / kVecs * m.units * kPanel + v % kVecs * kLanes;
        unit[v] = load_units(here);
        if (v % kVecs == 0) __builtin_prefetch(here + kNearAhead * kPanel, 0, 2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCodes; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) {
          const Vec w = weight<kBits>(unit[v], i, scale[v], offset[v]);
#pragma GCC unroll 4
          for (int r = 0; r < kNumRows; ++r) sum[r][v] = fma(splat(from[r][k + i]), w, sum[r][v]);
        }
    }
  }
  for (int r = 0; r < kNumRows; ++r)
    for (int v = 0; v < kWidth; ++v) store(sums + r * kColumns + v * kLanes, sum[r][v]);
}

// As many panels at once as make four chains of sums, which an FMA's time has room for.
template <int kBits, int kNumRows>
void few_rows(const Matrix& m, int64_t panel, int64_t num_panels, const float* const* x, float* sums) {
  constexpr int kAtOnce = std::max(1, 4 / (kNumRows * kVecs));
  int64_t p = 0;
  for (; p + kAtOnce <= num_panels; p += kAtOnce) few<kBits, kNumRows, kAtOnce>(m, panel + p, x, sums + p * kPanel);
  for (; p < num_panels; ++p) few<kBits, kNumRows, 1>(m, panel + p, x, sums + p * kPanel);
}

constexpr int64_t kDepth = 64;  // inputs of a block

// Weights of inputs [begin, end) of a panel, [end - begin, 16].
template <int kBits>
void dequantise(const Matrix& m, int64_t panel, int64_t begin, int64_t end, float* out) {
  constexpr int kCodes = 32 / kBits;
  const Unit* units = m.unit(panel, begin / kCodes);
  int64_t k = begin;
  for (int64_t group = begin / m.group; k < end; ++group) {
    const int64_t stop = std::min(end, (group + 1) * m.group);
    Vec scale[kVecs], offset[kVecs];
    for (int v = 0; v < kVecs; ++v) scale[v] = m.scale(panel, group, v), offset[v] = m.offset(panel, group, v);
    for (; k < stop; k += kCodes, units += kPanel, out += kCodes * kPanel) {
      __builtin_prefetch(units + kNearAhead * kPanel, 0, 2);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const Bits unit = load_units(units + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kCodes; ++i)
          store(out + i * kPanel + v * kLanes, weight<kBits>(unit, i, scale[v], offset[v]));
      }
    }
  }
}

// sums[kNumRows, kColumns] (+)= rows x from input k on times kNumPanels panels of weights, kDepth * kPanel apart.
template <int kNumRows, int kNumPanels>
void tile(const float* const* x, int64_t k, const float* w, int64_t depth, float* sums) {
  constexpr int kWidth = kNumPanels * kVecs;
  const float* from[kNumRows];
  Vec sum[kNumRows][kWidth];
  for (int r = 0; r < kNumRows; ++r) {
    from[r] = x[r] + k;
    for (int v = 0; v < kWidth; ++v) sum[r][v] = k == 0 ? Vec{} : load(sums + r * kColumns + v * kLanes);
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vec weights[kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v)
      weights[v] = load(w + v / kVecs * kDepth * kPanel + i * kPanel + v % kVecs * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kNumRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) sum[r][v] = fma(splat(from[r][i]), weights[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kNumRows; ++r)
    for (int v = 0; v < kWidth; ++v) store(sums + r * kColumns + v * kLanes, sum[r][v]);
}

struct Exact {
  static constexpr int64_t kRows = 6;  // of a register tile
  const Matrix& m;
  std::vector<const float*> rows;
  std::vector<float> converted;

  template <typename In>
  Exact(const Matrix& m, const In* x, const std::vector<Row>& wanted) : m(m) {
    if (!std::is_same_v<In, float>) converted.resize(wanted.size() * m.inputs);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const In* from = x + wanted[i].from * m.inputs;
      if constexpr (std::is_same_v<In, float>) {
        rows.push_back(from);
      } else {
        convert(converted.data() + i * m.inputs, from, m.inputs);
        rows.push_back(converted.data() + i * m.inputs);
      }
    }
  }

  // Of three rows two panels at once: one has fewer chains of sums than can be under way.
  template <int kNumRows>
  static void tiles(const float* const* x, int64_t k, const float* w, int64_t depth, float* sums) {
    constexpr int64_t kAtOnce = kLanes == 16 ? kWide : kNumRows == 3 ? 2 : 1;
    for (int64_t p = 0; p < kWide; p += kAtOnce)
      tile<kNumRows, kAtOnce>(x, k, w + p * kDepth * kPanel, depth, sums + p * kPanel);
  }

  template <int kBits>
  void sum_of(int64_t panel, int64_t num_panels, int64_t row, int64_t num_rows, float* sums) const {
    static constexpr std::array<void (*)(const Matrix&, int64_t, int64_t, const float* const*, float*), 4> kFew = {
        few_rows<kBits, 1>, few_rows<kBits, 2>, few_rows<kBits, 3>, few_rows<kBits, 4>};
    if (num_rows <= static_cast<int64_t>(kFew.size()))
      return kFew[num_rows - 1](m, panel, num_panels, rows.data() + row, sums);
    static constexpr std::array<void (*)(const float* const*, int64_t, const float*, int64_t, float*), kRows> kTiles = {
        nullptr, nullptr, tiles<3>, tiles<4>, tiles<5>, tiles<6>};  // of equal heights, so at least three rows
    const int64_t num_tiles = (num_rows + kRows - 1) / kRows;
    alignas(64) float weights[kWide * kDepth * kPanel];
    for (int64_t k = 0; k < m.inputs; k += kDepth) {
      const int64_t depth = std::min(kDepth, m.inputs - k);
      for (int64_t p = 0; p < num_panels; ++p)
        dequantise<kBits>(m, panel + p, k, k + depth, weights + p * kDepth * kPanel);
      for (int64_t i = 0; i < num_tiles; ++i) {
        const int64_t first = i * num_rows / num_tiles, count = (i + 1) * num_rows / num_tiles - first;
        kTiles[count - 1](rows.data() + row + first, k, weights, depth, sums + first * kColumns);
      }
    }
  }

  void sum(int64_t panel, int64_t num_panels, int64_t row, int64_t num_rows, float* sums) const {
    m.bits() == 4 ? sum_of<4>(panel, num_panels, row, num_rows, sums) : sum_of<8>(panel, num_panels, row, num_rows, sums);
  }
};

template <class Way, typename In, typename Out>
void multiply(const In* x, const Matrix& m, const std::vector<Row>& rows, Gate gate, Out* y) {
  const Way way(m, x, rows);
  // Chunks of whole blocks, but for the last row's.
  const int64_t num_rows = rows.size(), num_blocks = (num_rows + kBlock - 1) / kBlock;
  const int64_t num_chunks = (num_blocks * kBlock + kChunk - 1) / kChunk;
  parallel_for((m.panels + kWide - 1) / kWide * num_chunks, [&](int64_t task) {
    const int64_t chunk = task % num_chunks, first = chunk * num_blocks / num_chunks * kBlock;
    const int64_t count = std::min((chunk + 1) * num_blocks / num_chunks * kBlock, num_rows) - first;
    const int64_t panel = task / num_chunks * kWide, num_panels = std::min(kWide, m.panels - panel);
    alignas(64) float sums[kChunk * kColumns];
    way.sum(panel, num_panels, first, count, sums);
    for (int64_t i = 0; i < count; ++i)
      finish(sums + i * kColumns, num_panels, panel, m.outputs, gate, y + rows[first + i].to * m.outputs);
  });
}

ffi::Error MultiplyCodes(int64_t gate, float factor, bool is_int8, ffi::AnyBuffer x,
                         ffi::Buffer<ffi::U32> codes, ffi::AnyBuffer scales, ffi::AnyBuffer offsets,
                         ffi::Buffer<ffi::S32> rows, ffi::Result<ffi::AnyBuffer> y) {
  const auto floats = [](const ffi::AnyBuffer& b) { return Floats{b.untyped_data(), b.element_type() == ffi::F16}; };
  const int64_t inputs = x.dimensions()[1], groups = scales.dimensions()[1];
  const Matrix m = {codes.typed_data(), floats(scales), floats(offsets), factor, inputs, y->dimensions()[1],
                    codes.dimensions()[0], codes.dimensions()[1], groups, inputs / groups};
  static thread_local std::vector<Row> wanted;
  wanted.clear();
  for (size_t i = 0; i < rows.element_count(); ++i)
    if (rows.typed_data()[i] >= 0) wanted.push_back({static_cast<int32_t>(i), rows.typed_data()[i]});
  const auto run = [&](auto in, auto out) {
    const auto* from = static_cast<const decltype(in)*>(x.untyped_data());
    auto* to = static_cast<decltype(out)*>(y->untyped_data());
    if constexpr (kHasTiles && std::is_same_v<decltype(in), BFloat16>)
      if (!is_int8) return multiply_by_tiles(from, CodedPanels(m), wanted, static_cast<Gate>(gate), to);
    is_int8 ? multiply<Int8>(from, m, wanted, static_cast<Gate>(gate), to)
            : multiply<Exact>(from, m, wanted, static_cast<Gate>(gate), to);
  };
  if (x.element_type() == ffi::F32) {
    run(float{}, float{});
  } else if (y->element_type() == ffi::F32) {
    run(BFloat16{}, float{});
  } else {
    run(BFloat16{}, BFloat16{});
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_multiply_codes, MultiplyCodes,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("gate")
                                  .Attr<float>("factor")
                                  .Attr<bool>("is_int8")
                                  .Arg<ffi::AnyBuffer>()          // x
                                  .Arg<ffi::Buffer<ffi::U32>>()   // codes
                                  .Arg<ffi::AnyBuffer>()          // scales
                                  .Arg<ffi::AnyBuffer>()          // offsets
                                  .Arg<ffi::Buffer<ffi::S32>>()   // rows
                                  .Ret<ffi::AnyBuffer>());        // y
