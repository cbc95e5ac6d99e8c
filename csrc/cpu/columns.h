// Computes columns: an op's linear part and vector program at some of its sites and slots, and the draw. Holds the
// working memory that this takes, so every part of an op that runs at the same time has a Columns of its own.
#pragma once
#include <vector>

#include "../plan.h"
#include "kernels.h"
#include "tables.h"

namespace fastgen {

// Where a buffer lives in this run; `slot` floats from one slot's copy to the next (0: shared by all).
struct BufferPlace {
  float* base;
  int64_t slot;
  int32_t channels, ring_rows, ring_cols;

  float* at(int64_t i, int64_t j, int32_t chan) const {
    const int64_t row = i < ring_rows ? i : i % ring_rows;
    const int64_t col = j < ring_cols ? j : j % ring_cols;
    return base + (row * ring_cols + col) * channels + chan;
  }
};

struct Site {
  int32_t i, j;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `part` of [0, n) in equal parts.
inline Range share(int64_t n, int64_t parts, int64_t part) { return {n * part / parts, n * (part + 1) / parts}; }

// What all parts of one run share.
struct Run {
  const Tables& tables;
  const Kernels& kernels;
  const RunArgs& args;
  std::vector<BufferPlace> places;  // by buffer
  const float* zeros;               // as many as any tap has channels: what is read outside the bounds
  std::vector<Site> sites;          // of the item at hand; column = index of site * slots + slot
};

class Columns {
 public:
  static constexpr int64_t kBlock = 64;  // columns that linear() takes at once

  explicit Columns(const Run& run);

  // Linear part and program of columns, in working memory of its own.
  void compute(const ReadyOp& ready, Range columns);

  // The linear part of at most kBlock columns and some panels; the first column's scratch is at `scratch`.
  void linear(const ReadyOp& ready, Range columns, Range panels, float* scratch);

  // The vector program of a column.
  void program(const ReadyOp& ready, int64_t column, float* scratch);

  // Draws the values of a step at a site, and writes them to `out` and, encoded, to the input buffer.
  void draw(int64_t step, int32_t site, int32_t phase, int64_t slot);

 private:
  const float* source(const Tap& tap, int64_t i, int64_t j) const;
  void point_columns(const ReadyOp& ready, Range columns);
  void start_columns(const ReadyOp& ready, Range columns, Range panels, float* scratch);
  void run_tiles(const ReadyOp& ready, int64_t columns, Range panels, float* scratch);
  void move(const ReadyOp& ready, const Micro& micro, Site site, int64_t slot, float* scratch);
  const float* gather_params(int64_t step, int32_t site, int32_t phase, int64_t slot);
  void feed(int32_t site, int64_t slot, int32_t channel, float value);

  const Run& run_;
  const Program& program_;
  const int64_t slots_;
  std::vector<const float*> x_;  // [tap][column of the block]: where each tap of each column is read
  Pages scratch_;
  std::vector<float> params_, values_, known_;
  std::vector<double> uniforms_;
};

}  // namespace fastgen
