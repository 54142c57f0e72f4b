// bfloat16 products on AMX (cpu_tiles.h), at any number of rows. A panel is a run of tiles as it lies: [K / 32] of 16 pairs of
// inputs x 16 outputs; or such tiles are made of it (cpu_codes_tiles.h), in the thread's own memory. Rows are copied into the
// order of tiles, up to 16 rows x 32 inputs each.
//
// Every sum runs over K in one order, 32 inputs at a time, whatever the number of rows: so there is one kind of product only,
// also where a vector unit would be as fast.
//
// Few rows wait for memory, and many for what lies in the caches. Weights are asked for before they are needed: by one row tile
// 2 KiB ahead of themselves, by more a pair of panels ahead, while the pair before is multiplied. Both at once need the lines
// that are under way between caches, so many rows go through a pair in blocks along K that stay in L1.

#pragma once

#include <vector>

#include "cpu_pages.h"
#include "cpu_panels.h"
#include "cpu_tiles.h"

namespace {

constexpr int kLine = 2 * kPanel;              // floats of a row of sums: of two panels
constexpr int64_t kStepInputs = 2 * kTileDepth;  // of a tile
constexpr int64_t kFewRows = 2 * kTileRows;    // that meet a panel all at once
constexpr int64_t kBlockSteps = 6;             // tiles along K that more of them go through
constexpr int64_t kAheadBytes = 2 << 10;       // of one row tile's weights
constexpr int64_t kChunkBytes = 1 << 20;       // of rows that stay in L2, beside a run of panels
constexpr int64_t kChunkTiles = 16;            // row tiles whose sums stay in L1, nearly
constexpr int64_t kSumsBytes = kChunkTiles * kTileRows * kLine * sizeof(float);
constexpr int64_t kRunBytes = 256 << 10;       // of panels that a thread takes at once
constexpr int64_t kMadeSteps = 8;              // of a pair of panels whose tiles are made
constexpr int64_t kMadeBytes = kMadeSteps * 2 * kTileBytes;
constexpr int kCacheLine = 64;

// Registers: a row tile's sums are two, by the panels of a pair, whose tiles are kW and the next.
constexpr int kSums = 0, kNextSums = 2, kX = 4, kNextX = 5, kW = 6;

// To the second cache, past the first.
inline void prefetch_lines(const char* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(from + i * kCacheLine, 0, 2);
}

// A thread's copy of the rows, so that none waits for another's: for each 16 of them [steps, rows, 64 bytes], with zeros behind
// K.
class TileRows {
 public:
  void arrange(const BFloat16* x, const std::vector<Row>& rows, int64_t inputs) {
    num_rows_ = rows.size();
    steps_ = (inputs + kStepInputs - 1) / kStepInputs;
    const int64_t bytes = num_tiles() * kTileRows * steps_ * sizeof(Values);
    lines_ = reinterpret_cast<Values*>(scratch_.of(bytes + kSumsBytes + kMadeBytes));
    constexpr int64_t kValues = sizeof(Values) / sizeof(BFloat16);
    for (int64_t row = 0; row < num_rows_; ++row) {
      const BFloat16* from = x + rows[row].from * inputs;
      const int64_t tile = row / kTileRows, height = rows_of(tile);
      Values* to = lines_ + tile * kTileRows * steps_ + row % kTileRows;
      for (int64_t k = 0; k < steps_; ++k) {
        Values values = {};
        const int64_t rest = inputs - k * kValues;
        std::memcpy(&values, from + k * kValues, rest >= kValues ? sizeof values : rest * sizeof(BFloat16));
        to[k * height] = values;
      }
    }
  }

  int64_t num_rows() const { return num_rows_; }
  int64_t steps() const { return steps_; }
  int64_t num_tiles() const { return (num_rows_ + kTileRows - 1) / kTileRows; }
  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kTileRows, num_rows_ - tile * kTileRows); }
  const char* at(int64_t tile, int64_t step) const {
    return lines_[tile * kTileRows * steps_ + step * rows_of(tile)].bytes;
  }
  // [kChunkTiles * 16, kLine], beside them.
  float* sums() const { return reinterpret_cast<float*>(lines_ + num_tiles() * kTileRows * steps_); }
  // And kMadeBytes of tiles that may be made of panels.
  char* made() const { return reinterpret_cast<char*>(sums()) + kSumsBytes; }
  // From a step to the next.
  int64_t step_bytes(int64_t tile) const { return rows_of(tile) * kRowBytes; }

 private:
  struct alignas(kRowBytes) Values {
    char bytes[kRowBytes];
  };
  Scratch scratch_;
  Values* lines_ = nullptr;
  int64_t num_rows_ = 0, steps_ = 0;
};

// Two panels as they are multiplied, that lie ready in memory. What follows a panel may be anything, so the end of one that is no
// whole tile is copied, with zeros behind it.
class DensePair {
 public:
  static constexpr bool kLieReady = true;

  // depth: pairs of inputs.
  DensePair(const char* first, const char* second, int64_t depth) : whole_(depth / kTileDepth), panels_{first, second} {
    const int64_t rest = depth % kTileDepth * kRowBytes;
    for (int64_t i = 0; i < 2 && rest > 0; ++i) {
      std::memset(ends_[i], 0, kTileBytes);
      std::memcpy(ends_[i], panels_[i] + whole_ * kTileBytes, rest);
    }
  }

  const char* at(int panel, int64_t step) const {
    return step < whole_ ? panels_[panel] + step * kTileBytes : ends_[panel];
  }
  // Makes the tiles of a step, where they do not lie ready.
  void make(int64_t) const {}

 private:
  int64_t whole_;
  const char* panels_[2];
  alignas(kCacheLine) char ends_[2][kTileBytes];
};

// Panels that are tiles as they lie.
struct DensePanels {
  const char* w;
  int64_t inputs, outputs, count;

  int64_t depth() const { return (inputs + 1) / 2; }
  // In memory, of one.
  int64_t num_bytes() const { return depth() * kRowBytes; }
  const char* at(int64_t panel) const { return w + panel * num_bytes(); }
  // That of `panel` and the next, or the last one twice.
  using Pair = DensePair;
  DensePair pair(int64_t panel, char*) const { return {at(panel), at(std::min(panel + 1, count - 1)), depth()}; }
};

// What a thread does between the products of tiles, some at every step: vector units and memory are free meanwhile.
template <typename Out>
struct Between {
  const Row* places;
  int64_t outputs;
  Gate gate;
  Out* y;

  // Panels that are fetched while others are multiplied.
  const char* next = nullptr;
  int64_t lines = 0;
  // Rows of y that are made of the sums of the tiles before. They are done before other sums take their place: two tiles'
  // rows at most, at so many a step.
  const float* sums = nullptr;
  int64_t row = 0, end_row = 0, panel = 0;

  void step(int64_t num_rows) {
    prefetch_lines(next, lines);
    next += lines * kCacheLine;
    finish_rows(num_rows);
  }

  void finish_rows(int64_t num_rows) {
    for (const int64_t end = std::min(row + num_rows, end_row); row < end; ++row, sums += kLine)
      finish(sums, 2, panel, outputs, gate, y + places[row].to * outputs);
  }

  void finish_all() { finish_rows(end_row - row); }

  void follow(const float* made, int64_t first, int64_t end, int64_t of_panel) {
    sums = made, row = first, end_row = end, panel = of_panel;
  }
};

// Shapes change with the heights of row tiles: only the last ones' are not 16.
class SumShapes {
 public:
  void set(int64_t first, int64_t second) {
    if (first == first_ && second == second_) return;
    TileShapes shapes;
    for (const int t : {kSums, kSums + 1, kX}) shapes.rows[t] = first;
    for (const int t : {kNextSums, kNextSums + 1, kNextX}) shapes.rows[t] = second;
    shape_tiles(shapes);
    first_ = first, second_ = second;
  }

 private:
  int64_t first_ = 0, second_ = 0;
};

template <int kFirst>
inline void load_sums(const float* sums) {
  load_tile<kFirst>(sums, kLine * sizeof(float));
  load_tile<kFirst + 1>(sums + kPanel, kLine * sizeof(float));
}
template <int kFirst>
inline void store_sums(float* sums) {
  store_tile<kFirst>(sums, kLine * sizeof(float));
  store_tile<kFirst + 1>(sums + kPanel, kLine * sizeof(float));
}
template <int kFirst>
inline void clear_sums() {
  clear_tile<kFirst>();
  clear_tile<kFirst + 1>();
}

// One tile of a panel meets the row tiles that are loaded.
template <int kRowTiles, bool kOnce, int kPanelOfPair>
inline void meet_panel(const char* w) {
  constexpr int kTile = kW + kPanelOfPair;
  if constexpr (kOnce && kRowTiles == 1) prefetch_lines(w + kAheadBytes, kTileBytes / kCacheLine);
  if constexpr (kOnce) {
    load_tile_once<kTile>(w, kRowBytes);
  } else {
    load_tile<kTile>(w, kRowBytes);
  }
  multiply_tiles<kSums + kPanelOfPair, kX, kTile>();
  if constexpr (kRowTiles == 2) multiply_tiles<kNextSums + kPanelOfPair, kNextX, kTile>();
}

// sums[kRowTiles * 16, kLine] (+)= one row tile or two, from number `tile` on, times two panels, over the steps from `begin` to
// `end` along K. kOnce: no other rows follow, so panels that lie ready come from memory, and others are made as they are met, each
// step while the one before is multiplied.
template <int kRowTiles, bool kOnce, class Pair, typename Out>
void multiply_block(const TileRows& rows, int64_t tile, const Pair& panels, int64_t begin, int64_t end, float* sums,
                    Between<Out>& between) {
  const int64_t finished = (2 * kTileRows + end - begin - 1) / (end - begin);
  const char* x = rows.at(tile, begin);
  const char* next_x = kRowTiles == 2 ? rows.at(tile + 1, begin) : nullptr;
  const int64_t x_bytes = rows.step_bytes(tile), next_x_bytes = kRowTiles == 2 ? rows.step_bytes(tile + 1) : 0;
  float* const next_sums = sums + kTileRows * kLine;
  if (begin == 0) {
    clear_sums<kSums>();
    if constexpr (kRowTiles == 2) clear_sums<kNextSums>();
  } else {
    load_sums<kSums>(sums);
    if constexpr (kRowTiles == 2) load_sums<kNextSums>(next_sums);
  }
  for (int64_t step = begin; step < end; ++step, x += x_bytes, next_x += next_x_bytes) {
    if (kOnce && step + 1 < end) panels.make(step + 1);
    load_tile<kX>(x, kRowBytes);
    if constexpr (kRowTiles == 2) load_tile<kNextX>(next_x, kRowBytes);
    meet_panel<kRowTiles, kOnce && Pair::kLieReady, 0>(panels.at(0, step));
    meet_panel<kRowTiles, kOnce && Pair::kLieReady, 1>(panels.at(1, step));
    between.step(finished);
  }
  store_sums<kSums>(sums);
  if constexpr (kRowTiles == 2) store_sums<kNextSums>(next_sums);
}

// The sums of row tiles `first` to `end` times a pair of panels, the first of them number `panel`.
template <class Panels, typename Out>
void multiply_pair(const TileRows& rows, int64_t first, int64_t end, const Panels& panels, int64_t panel,
                   Between<Out>& between, SumShapes& shapes) {
  using Pair = typename Panels::Pair;
  const bool few = rows.num_rows() <= kFewRows;
  const int64_t steps = rows.steps(), num_blocks = few ? 1 : (steps + kBlockSteps - 1) / kBlockSteps;
  const Pair pair = panels.pair(panel, rows.made());
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t k = block * steps / num_blocks, k_end = (block + 1) * steps / num_blocks;
    for (int64_t step = k; step < (few ? std::min<int64_t>(k + 2, k_end) : k_end); ++step) pair.make(step);
    for (int64_t tile = first; tile < end; tile += 2) {
      float* const out = rows.sums() + (tile - first) * kTileRows * kLine;
      const bool two = tile + 1 < end;
      shapes.set(rows.rows_of(tile), two ? rows.rows_of(tile + 1) : kTileRows);
      const auto multiply = two ? few ? multiply_block<2, true, Pair, Out> : multiply_block<2, false, Pair, Out>
                                : few ? multiply_block<1, true, Pair, Out> : multiply_block<1, false, Pair, Out>;
      multiply(rows, tile, pair, k, k_end, out, between);
      if (block + 1 == num_blocks)
        between.follow(out, tile * kTileRows, std::min((tile + 2) * kTileRows, rows.num_rows()), panel);
    }
  }
}

// Panels `begin` to `end` of a product, by one thread.
template <class Panels, typename Out>
void multiply_run(const TileRows& rows, const std::vector<Row>& places, const Panels& panels, int64_t begin, int64_t end,
                  Gate gate, Out* y) {
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (rows.steps() * kTileBytes) / 2 * 2, 2, kChunkTiles);
  SumShapes shapes;
  Between<Out> between{places.data(), panels.outputs, gate, y};
  for (int64_t first = 0; first < rows.num_tiles(); first += chunk) {
    const int64_t end_tile = std::min(first + chunk, rows.num_tiles()), num_blocks = (end_tile - first + 1) / 2;
    for (int64_t panel = begin; panel < end; panel += 2) {
      // The first chunk brings the panels into L2, where the others find them. One row tile has asked for its own.
      const bool fetches = Panels::Pair::kLieReady && first == 0 && rows.num_tiles() > 1;
      between.next = panels.at(panel + 2);
      between.lines = fetches ? (2 * kTileBytes / kCacheLine + num_blocks - 1) / num_blocks : 0;
      multiply_pair(rows, first, end_tile, panels, panel, between, shapes);
    }
  }
  between.finish_all();
  release_tiles();
}

// Panels by thread: each walks its own from end to end, as memory likes, and then helps the others with theirs.
class Shares {
 public:
  Shares(int64_t num_threads, int64_t num_panels, int64_t panel_bytes) : shares_(num_threads) {
    const int64_t pairs = (num_panels + 1) / 2;
    for (int64_t i = 0; i < num_threads; ++i) {
      shares_[i].next = pairs * i / num_threads * 2;
      shares_[i].end = std::min(pairs * (i + 1) / num_threads * 2, num_panels);
    }
    run_ = std::min(kRunBytes / panel_bytes, num_panels / (4 * num_threads)) / 2 * 2;
    run_ = std::max<int64_t>(run_, 2);
  }

  // work(begin, end) for runs of panels until none are left.
  template <class Work>
  void take(int64_t thread, Work work) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share& share = shares_[(thread + i) % shares_.size()];
      for (int64_t p; (p = share.next.fetch_add(run_)) < share.end;) work(p, std::min(p + run_, share.end));
    }
  }

 private:
  struct alignas(kCacheLine) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares_;
  int64_t run_;
};

template <class Panels, typename Out>
void multiply_by_tiles(const BFloat16* x, const Panels& panels, const std::vector<Row>& rows, Gate gate, Out* y) {
  const int64_t num_threads = std::clamp<int64_t>(jaxserve::Helpers::all().num_threads(), 1, (panels.count + 1) / 2);
  Shares shares(num_threads, panels.count, panels.num_bytes());
  parallel_for(num_threads, [&](int64_t thread) {
    static thread_local TileRows mine;
    bool arranged = false;
    shares.take(thread, [&](int64_t begin, int64_t end) {
      if (!arranged) mine.arrange(x, rows, panels.inputs);
      arranged = true;
      multiply_run(mine, rows, panels, begin, end, gate, y);
    });
  });
}

}  // namespace
