// y[T, N] = x[T, K] @ w[N, K]^T on a CPU, with weights packed once, in float32 or bfloat16 with float32 sums.
//
// A panel holds 16 outputs: [K, 16] float32, or [K / 2, 16, 2] bfloat16, in which two neighbours along K lie together as
// vdpbf16ps and AMX (cpu_gemm_tiles.h) want them. Either is [depth, 16] units of 32 bits, and a unit of a row meets a vector of
// a panel, so one loop serves both.
//
// Every sum runs over K in one order, whatever the number of rows: a row's result does not depend on its batch-mates.
//
// Only the rows that are asked for are computed: y[i] = x[rows[i]] @ w^T where rows[i] >= 0. Shapes are fixed, batches are
// not, and on a CPU every row costs. Of gated weights a panel holds 8 gates and the 8 values that go through them, and
// activation(gate) * value is what comes out.
//
// The rows lie in groups, one after the other, and each group meets a matrix of its own: experts', or all rows the one.

#include <array>
#include <cstddef>
#include <vector>

#include "cpu_gemm.h"
#include "cpu_gemm_tiles.h"
#include "cpu_pages.h"

namespace {

#ifdef __AVX512F__
constexpr int kRows = 9, kPanels = 3;  // of a register tile: 27 sums of 32 registers, nine rows for three vectors
#else
constexpr int kRows = 6, kPanels = 1;  // 12 of 16
#endif
constexpr int kColumns = kPanels * kPanel;
constexpr int64_t kDepth = 768;              // units of a block: its part of the panels stays in the L2 cache
constexpr int64_t kAhead = 48;               // units that are under way from memory
constexpr int64_t kTiles = 16;               // row tiles of a task
constexpr int64_t kInlineUnits = 16 * 1024;  // rows that are arranged faster than a thread is woken

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
    // The processor looks ahead within 4 KiB only. One row or two leave it nothing else to do.
#pragma GCC unroll 8
    for (int v = 0; v < kNumPanels && kNumRows > 2; ++v)
      __builtin_prefetch(w + v * stride + (k + kAhead) * kPanel, 0, 2);
#pragma GCC unroll 16
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
void arrange(const typename Kind::Value* x, const Row* rows, const Matrix& m, Unit* out) {
  const typename Kind::Value* from[kNumRows];
  for (int r = 0; r < kNumRows; ++r) from[r] = x + rows[r].from * m.inputs;
  const int64_t whole = m.inputs / Kind::kWidth;
  for (int64_t d = 0; d < whole; ++d) {
#pragma GCC unroll 16
    for (int r = 0; r < kNumRows; ++r) std::memcpy(out + d * kNumRows + r, from[r] + d * Kind::kWidth, sizeof *out);
  }
  for (int r = 0; whole < m.depth && r < kNumRows; ++r) {
    out[whole * kNumRows + r] = 0;
    std::memcpy(out + whole * kNumRows + r, from[r] + whole * Kind::kWidth, sizeof *x);
  }
}

template <class Kind>
struct Kernels {
  typedef void (*Tile)(const Unit*, const Unit*, int64_t, int64_t, bool, float*);
  typedef void (*Arrange)(const typename Kind::Value*, const Row*, const Matrix&, Unit*);

  // By the number of rows, less one.
  std::array<Tile, kRows> wide, narrow;
  std::array<Arrange, kRows> arrange;

  template <size_t... kLess>
  static constexpr Kernels of(std::index_sequence<kLess...>) {
    return {{tile<Kind, kPanels, kLess + 1>...}, {tile<Kind, 1, kLess + 1>...}, {::arrange<Kind, kLess + 1>...}};
  }
};

template <class Kind, typename Out>
void multiply(const typename Kind::Value* x, const Unit* w, const std::vector<Row>& rows,
              const Matrix& m, Gate gate, Out* y) {
  static constexpr auto kKernels = Kernels<Kind>::of(std::make_index_sequence<kRows>());
  // Tiles of as equal heights as can be.
  const int64_t num_rows = rows.size(), num_tiles = (num_rows + kRows - 1) / kRows;
  const auto begin_of = [&](int64_t i) { return i * num_rows / num_tiles; };
  static thread_local std::vector<uint32_t> scratch;
  scratch.resize(num_rows * m.depth);
  Unit* units = scratch.data();
  const auto arrange_tile = [&](int64_t i) {
    const int64_t row = begin_of(i), count = begin_of(i + 1) - row;
    kKernels.arrange[count - 1](x, rows.data() + row, m, units + row * m.depth);
  };
  if (num_rows * m.depth <= kInlineUnits) {
    for (int64_t i = 0; i < num_tiles; ++i) arrange_tile(i);
  } else {
    parallel_for(num_tiles, arrange_tile);
  }

  const int64_t num_groups = (m.panels + kPanels - 1) / kPanels;
  const int64_t num_chunks = (num_tiles + kTiles - 1) / kTiles;
  const int64_t num_blocks = (m.depth + kDepth - 1) / kDepth;
  parallel_for(num_groups * num_chunks, [&](int64_t task) {
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
      for (int64_t row = first_row; row < end_row; ++row)
        finish(sums + (row - first_row) * width * kPanel, width, panel, m.outputs, gate, y + rows[row].to * m.outputs);
    }
  });
}

// w [N, K] -> panels; an input that is not there is zero.
template <class Kind>
void pack(const typename Kind::Value* w, const Matrix& m, Unit* panels) {
  parallel_for(m.panels, [&](int64_t panel) {
    Row rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) rows[i].from = panel * kPanel + i;
    arrange<Kind, kPanel>(w, rows, m, panels + panel * kPanel * m.depth);
  });
}

template <class Kind>
Matrix matrix_of(int64_t inputs, int64_t outputs, int64_t panels) {
  return {inputs, (inputs + Kind::kWidth - 1) / Kind::kWidth, outputs, panels};
}

ffi::Error Pack(ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> panels) {
  prefer_large_pages(panels->untyped_data(), panels->size_bytes());  // they are read from end to end in every step
  const auto run = [&](auto kind) {
    using Kind = decltype(kind);
    const Matrix m = matrix_of<Kind>(w.dimensions()[1], w.dimensions()[0], panels->dimensions()[0]);
    pack<Kind>(static_cast<const typename Kind::Value*>(w.untyped_data()), m,
               static_cast<Unit*>(panels->untyped_data()));
  };
  w.element_type() == ffi::F32 ? run(Float32{}) : run(Pairs{});
  return ffi::Error::Success();
}

ffi::Error Multiply(int64_t gate, ffi::AnyBuffer x, ffi::AnyBuffer panels,
                    ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> group_sizes, ffi::Result<ffi::AnyBuffer> y) {
  const auto run = [&](auto kind, auto out) {
    using Kind = decltype(kind);
    const auto shape = panels.dimensions();  // of groups perhaps, panels, and a panel's own
    const Matrix m = matrix_of<Kind>(x.dimensions()[1], y->dimensions()[1], shape[shape.size() - Kind::kWidth - 2]);
    static thread_local std::vector<Row> wanted;
    int64_t row = 0;
    for (size_t group = 0; group < group_sizes.element_count(); ++group) {
      wanted.clear();
      for (const int64_t end = row + group_sizes.typed_data()[group]; row < end; ++row)
        if (rows.typed_data()[row] >= 0) wanted.push_back({static_cast<int32_t>(row), rows.typed_data()[row]});
      if (wanted.empty()) continue;
      const auto* values = static_cast<const typename Kind::Value*>(x.untyped_data());
      const auto* matrix = static_cast<const Unit*>(panels.untyped_data()) + group * m.panels * m.depth * kPanel;
      auto* results = static_cast<decltype(out)*>(y->untyped_data());
      if constexpr (kHasTiles && Kind::kWidth == 2) {
        const DensePanels tiles{reinterpret_cast<const char*>(matrix), m.inputs, m.outputs, m.panels};
        multiply_by_tiles(values, tiles, wanted, static_cast<Gate>(gate), results);
      } else {
        multiply<Kind>(values, matrix, wanted, m, static_cast<Gate>(gate), results);
      }
    }
  };
  if (x.element_type() == ffi::F32) {
    run(Float32{}, float{});
  } else if (y->element_type() == ffi::F32) {
    run(Pairs{}, float{});
  } else {
    run(Pairs{}, BFloat16{});
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_pack, Pack,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()   // w
                                  .Ret<ffi::AnyBuffer>());  // panels

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_multiply, Multiply,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("gate")
                                  .Arg<ffi::AnyBuffer>()          // x
                                  .Arg<ffi::AnyBuffer>()          // panels
                                  .Arg<ffi::Buffer<ffi::S32>>()   // rows
                                  .Arg<ffi::Buffer<ffi::S32>>()   // group_sizes
                                  .Ret<ffi::AnyBuffer>());         // y
