// One rank of a run: it computes its share of every op and draw. All ranks walk the same schedule and take the same
// decisions, so they agree on every barrier without talking.
#pragma once
#include <vector>

#include "../plan.h"
#include "kernels.h"
#include "pool.h"
#include "tables.h"

namespace fastgen {

// Where a buffer lives in this run; `slot` floats from one slot's copy to the next (0: shared by all).
struct Place {
  float* base;
  int64_t slot;
  int32_t channels, ring_rows, ring_cols;

  float* at(int64_t i, int64_t j, int32_t chan) const {
    const int64_t row = i < ring_rows ? i : i % ring_rows;
    const int64_t col = j < ring_cols ? j : j % ring_cols;
    return base + (row * ring_cols + col) * channels + chan;
  }
};

// What the ranks of one run share.
struct Run {
  const Tables& tables;
  const Kernels& kernels;
  Pool& pool;
  const RunArgs& args;
  std::vector<Place> places;    // by buffer
  const float* zeros;           // as many as any tap has channels: what is read outside the bounds
  float* scratch;               // of the columns that ranks compute together
  int64_t scratch_floats;
};

class Worker {
 public:
  Worker(const Run& run, int rank);

  // Runs items [begin, end) in the given period of the schedule.
  void run_items(const Item* begin, const Item* end, int64_t period);

  // Draws the values of a step at a site, and writes them to `out` and to the input buffer.
  void draw(int64_t step, int32_t site);

 private:
  struct Site {
    int32_t i, j;
  };
  struct Range {
    int64_t begin, end;
  };
  struct Split {            // of a stage among the ranks: panels x columns of the linear part
    int64_t for_columns = -1;
    int panels = 1, columns = 1;
    bool share_program = false;
  };
  // Who has written since the last barrier. What rank 0 wrote, rank 0 may read without one.
  enum Pending { kNobody, kRoot, kAll };

  static Range share(int64_t n, int parts, int part) { return {n * part / parts, n * (part + 1) / parts}; }
  void sync();
  const Split& split(const Stage& stage, int64_t columns);
  void run_stage(const Stage& stage);
  void run_alone(const Stage& stage, Range columns);
  void run_together(const Stage& stage, const Split& split, int64_t columns);
  void linear(const Stage& stage, Range columns, Range panels, float* scratch);
  void point_columns(const Stage& stage, Range columns);
  void start_columns(const Stage& stage, Range columns, Range panels, float* scratch);
  void run_tiles(const Stage& stage, int64_t columns, Range panels, float* scratch);
  void program(const Stage& stage, int64_t column, float* scratch);
  void move(const Stage& stage, const Micro& micro, Site site, int64_t slot, float* scratch);
  const float* source(const Tap& tap, int64_t i, int64_t j) const;
  void draw_slot(int64_t step, int32_t site, int64_t slot);
  void feed(int32_t site, int64_t slot, int32_t channel, float value);

  const Run& run_;
  const Program& program_;
  const int rank_;
  const int64_t slots_;
  Pending pending_ = kNobody;
  std::vector<Site> sites_;              // of the item at hand; column = index of site * slots + slot
  std::vector<const float*> x_;          // [tap][column of the block]: where each tap of each column is read
  std::vector<float> private_scratch_;
  std::vector<Split> splits_;            // by stage, of the last number of columns
  std::vector<float> params_, uniforms_, values_, known_;
};

}  // namespace fastgen
