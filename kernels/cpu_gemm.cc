// y[T, N] = x[T, K] @ w[N, K]^T on a CPU, with weights packed once, in float32 or bfloat16 with float32 sums.
//
// A panel holds 16 outputs: [K, 16] float32, or [K / 2, 16, 2] bfloat16, in which two neighbours along K lie together as
// vdpbf16ps wants them (and AMX would). Either is [depth, 16] units of 32 bits, and a unit of a row meets a vector of
// a panel, so one loop serves both.
//
// Every sum runs over K in one order, whatever the number of rows: a row's result does not depend on its batch-mates.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>
#include <cstddef>
#include <vector>

#include "cpu_common.h"

namespace {

constexpr int kPanel = 16;
constexpr int kVecs = kPanel / kLanes;  // vectors of a panel
#ifdef __AVX512F__
constexpr int kRows = 9, kPanels = 3;  // of a register tile: 27 sums of 32 registers, nine rows for three vectors
#else
constexpr int kRows = 6, kPanels = 1;  // 12 of 16
#endif
constexpr int kColumns = kPanels * kPanel;
constexpr int64_t kDepth = 768;              // units of a block: its part of the panels stays in the L2 cache
constexpr int64_t kTiles = 16;               // row tiles of a task
constexpr int64_t kInlineUnits = 16 * 1024;  // rows that are arranged faster than a thread is woken

typedef uint32_t __attribute__((may_alias)) Unit;

struct Float32 {
  using Value = float;
  static constexpr int kWidth = 1;
  static inline Vec add(Vec sum, Unit x, Bits w) {
    float value;
    std::memcpy(&value, &x, sizeof value);
    return sum + splat(value) * (Vec)w;
  }
};

struct Pairs {
  using Value = BFloat16;
  static constexpr int kWidth = 2;
  static inline Vec add(Vec sum, Unit x, Bits w) {
    const Bits pair = x - Bits{};
#ifdef __AVX512BF16__
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)w);
#else
    sum += (Vec)(pair << 16) * (Vec)(w << 16);
    return sum + (Vec)(pair & 0xffff0000u) * (Vec)(w & 0xffff0000u);
#endif
  }
};

struct Matrix {
  int64_t rows, inputs, depth, outputs, panels;
};

// sums[kNumRows, kNumPanels * kPanel] (+)= x[depth, kNumRows] times kNumPanels panels of `stride` units each.
template <class Kind, int kNumPanels, int kNumRows>
void tile(const Unit* x, const Unit* w, int64_t depth, int64_t stride, bool first, float* sums) {
  constexpr int kWidth = kNumPanels * kVecs;
  Vec sum[kNumRows][kWidth];
  for (int r = 0; r < kNumRows; ++r)
    for (int v = 0; v < kWidth; ++v) sum[r][v] = first ? Vec{} : load(sums + (r * kWidth + v) * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Bits weights[kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < kWidth; ++v)
      weights[v] = *reinterpret_cast<const Bits*>(w + v / kVecs * stride + k * kPanel + v % kVecs * kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kNumRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) sum[r][v] = Kind::add(sum[r][v], x[k * kNumRows + r], weights[v]);
    }
  }
  for (int r = 0; r < kNumRows; ++r)
    for (int v = 0; v < kWidth; ++v) store(sums + (r * kWidth + v) * kLanes, sum[r][v]);
}

// Rows [kNumRows, inputs] as [depth, kNumRows] units; an odd input is followed by a zero.
template <class Kind, int kNumRows>
void arrange(const typename Kind::Value* x, const Matrix& m, Unit* out) {
  const int64_t whole = m.inputs / Kind::kWidth;
  for (int64_t d = 0; d < whole; ++d) {
#pragma GCC unroll 32
    for (int r = 0; r < kNumRows; ++r)
      std::memcpy(out + d * kNumRows + r, x + r * m.inputs + d * Kind::kWidth, sizeof *out);
  }
  for (int r = 0; whole < m.depth && r < kNumRows; ++r) {
    out[whole * kNumRows + r] = 0;
    std::memcpy(out + whole * kNumRows + r, x + r * m.inputs + whole * Kind::kWidth, sizeof *x);
  }
}

template <class Kind>
struct Kernels {
  typedef void (*Tile)(const Unit*, const Unit*, int64_t, int64_t, bool, float*);
  typedef void (*Arrange)(const typename Kind::Value*, const Matrix&, Unit*);

  // By the number of rows, less one.
  std::array<Tile, kRows> wide, narrow;
  std::array<Arrange, kRows> arrange;

  template <size_t... kLess>
  static constexpr Kernels of(std::index_sequence<kLess...>) {
    return {{tile<Kind, kPanels, kLess + 1>...}, {tile<Kind, 1, kLess + 1>...}, {::arrange<Kind, kLess + 1>...}};
  }
};

template <class Kind, typename Out>
void multiply(ffi::ThreadPool& pool, const typename Kind::Value* x, const Unit* w, const Matrix& m, Out* y) {
  static constexpr auto kKernels = Kernels<Kind>::of(std::make_index_sequence<kRows>());
  // Tiles of as equal heights as can be.
  const int64_t num_tiles = (m.rows + kRows - 1) / kRows;
  const auto begin_of = [&](int64_t i) { return i * m.rows / num_tiles; };
  static thread_local std::vector<uint32_t> scratch;
  scratch.resize(m.rows * m.depth);
  Unit* units = scratch.data();
  const auto arrange_tile = [&](int64_t i) {
    const int64_t row = begin_of(i), count = begin_of(i + 1) - row;
    kKernels.arrange[count - 1](x + row * m.inputs, m, units + row * m.depth);
  };
  if (m.rows * m.depth <= kInlineUnits) {
    for (int64_t i = 0; i < num_tiles; ++i) arrange_tile(i);
  } else {
    parallel_for(pool, num_tiles, arrange_tile);
  }

  const int64_t num_groups = (m.panels + kPanels - 1) / kPanels;
  const int64_t num_chunks = (num_tiles + kTiles - 1) / kTiles;
  const int64_t num_blocks = (m.depth + kDepth - 1) / kDepth;
  parallel_for(pool, num_groups * num_chunks, [&](int64_t task) {
    const int64_t chunk = task % num_chunks;
    const int64_t first_tile = chunk * num_tiles / num_chunks, end_tile = (chunk + 1) * num_tiles / num_chunks;
    const int64_t first_row = begin_of(first_tile), end_row = begin_of(end_tile);
    const int64_t first_panel = task / num_chunks * kPanels;
    const int64_t end_panel = std::min(first_panel + kPanels, m.panels);
    const bool is_whole = end_panel - first_panel == kPanels;
    const auto& tiles = is_whole ? kKernels.wide : kKernels.narrow;
    const int64_t width = is_whole ? kPanels : 1;
    alignas(64) float sums[kTiles * kRows * kColumns];
    for (int64_t panel = first_panel; panel < end_panel; panel += width) {
      for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t k = block * m.depth / num_blocks, depth = (block + 1) * m.depth / num_blocks - k;
        for (int64_t i = first_tile; i < end_tile; ++i) {
          const int64_t row = begin_of(i), count = begin_of(i + 1) - row;
          tiles[count - 1](units + row * m.depth + k * count, w + (panel * m.depth + k) * kPanel, depth,
                           m.depth * kPanel, k == 0, sums + (row - first_row) * width * kPanel);
        }
      }
      const int64_t column = panel * kPanel, num_columns = std::min(width * kPanel, m.outputs - column);
      for (int64_t row = first_row; row < end_row; ++row)
        convert(y + row * m.outputs + column, sums + (row - first_row) * width * kPanel, num_columns);
    }
  });
}

// w [N, K] -> panels; outputs and inputs that are not there are zero.
template <class Kind>
void pack(ffi::ThreadPool& pool, const typename Kind::Value* w, const Matrix& m, Unit* panels) {
  parallel_for(pool, m.panels, [&](int64_t panel) {
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, m.outputs - first);
    Unit* out = panels + first * m.depth;
    for (int64_t i = 0; i < kPanel; ++i) {
      const auto* row = w + (first + i) * m.inputs;
      for (int64_t d = 0; d < m.depth; ++d) {
        const int64_t width = std::min<int64_t>(Kind::kWidth, m.inputs - d * Kind::kWidth);
        out[d * kPanel + i] = 0;
        if (i < count) std::memcpy(out + d * kPanel + i, row + d * Kind::kWidth, width * sizeof *row);
      }
    }
  });
}

// Panels are read from end to end in every step; with large pages the translation of addresses does not hold that up.
void prefer_large_pages(void* begin, size_t num_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + num_bytes) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

Matrix matrix_of(int64_t rows, int64_t inputs, int64_t outputs, int width) {
  return {rows, inputs, (inputs + width - 1) / width, outputs, (outputs + kPanel - 1) / kPanel};
}

ffi::Error Pack(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> panels) {
  const int64_t outputs = w.dimensions()[0], inputs = w.dimensions()[1];
  auto* out = static_cast<Unit*>(panels->untyped_data());
  prefer_large_pages(out, panels->size_bytes());
  if (w.element_type() == ffi::F32) {
    pack<Float32>(pool, static_cast<const float*>(w.untyped_data()), matrix_of(0, inputs, outputs, 1), out);
  } else {
    pack<Pairs>(pool, static_cast<const BFloat16*>(w.untyped_data()), matrix_of(0, inputs, outputs, 2), out);
  }
  return ffi::Error::Success();
}

ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer panels, ffi::Result<ffi::AnyBuffer> y) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const auto* w = static_cast<const Unit*>(panels.untyped_data());
  if (rows == 0) return ffi::Error::Success();
  if (x.element_type() == ffi::F32) {
    multiply<Float32>(pool, static_cast<const float*>(x.untyped_data()), w, matrix_of(rows, inputs, outputs, 1),
                      static_cast<float*>(y->untyped_data()));
  } else if (y->element_type() == ffi::F32) {
    multiply<Pairs>(pool, static_cast<const BFloat16*>(x.untyped_data()), w, matrix_of(rows, inputs, outputs, 2),
                    static_cast<float*>(y->untyped_data()));
  } else {
    multiply<Pairs>(pool, static_cast<const BFloat16*>(x.untyped_data()), w, matrix_of(rows, inputs, outputs, 2),
                    static_cast<BFloat16*>(y->untyped_data()));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_pack, Pack,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // w
                                  .Ret<ffi::AnyBuffer>());  // panels

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_multiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // panels
                                  .Ret<ffi::AnyBuffer>());  // y
