// Walks the schedule of one run and shares out the work.
#pragma once
#include <deque>
#include <vector>

#include "columns.h"
#include "pool.h"

namespace fastgen {

class Driver {
 public:
  // All memory of the run is taken here. `run` must outlive the driver.
  Driver(Run& run, Pool& pool);

  // Runs items [begin, end) in the given period of the schedule.
  void run_items(const Item* begin, const Item* end, int64_t period);

  // Draws the values of a step for every slot.
  void draw(int64_t step);

 private:
  struct Split {  // of an op: its linear part into panels x columns parts
    int64_t for_columns = -1;
    int panels = 1, columns = 1;
    bool share_program = false;  // after a linear part that was split by panels
  };

  const Split& split(const ReadyOp& ready, int64_t columns);
  void run_op(const ReadyOp& ready);
  void run_by_panels(const ReadyOp& ready, const Split& split, int64_t columns);

  Run& run_;
  const Program& program_;
  Pool& pool_;
  std::deque<Columns> parts_;  // by part
  Pages scratch_;              // of the columns that are split by panels
  int64_t scratch_floats_;
  std::vector<Split> splits_;  // by op, of the last number of columns
};

}  // namespace fastgen
