// How an op is shared. With few columns the threads divide the panels (each streams its own weights, always the same
// ones, so they stay in its cache), and the vector program, which needs all channels of a column, follows when all are
// done. With many columns they divide the columns, and every thread carries its own through linear part and program,
// block by block. Small ops stay on one thread. None of this changes a byte: see kernels.cpp.
#include "driver.h"

#include <algorithm>

namespace fastgen {
namespace {

constexpr int64_t kScratchFloats = 256 << 10;
constexpr double kHandOverCycles = 1200;  // the pool takes to open a stage and to see its end (pool.h)

// Weights that reach one core in a cycle, from the last-level cache or from memory.
double bytes_per_cycle(int64_t all_weights) { return all_weights <= (16 << 20) ? 24 : 7; }

}  // namespace

Driver::Driver(Run& run, Pool& pool) : run_(run), program_(run.tables.program()), pool_(pool), splits_(program_.nops) {
  run_.sites.reserve(run.tables.max_count);
  for (int part = 0; part < pool.threads(); ++part) parts_.emplace_back(run);
  scratch_floats_ = kScratchFloats;
  for (const ReadyOp& s : run.tables.ready_ops()) scratch_floats_ = std::max(scratch_floats_, s.stride);
  scratch_ = Pages(sizeof(float) * scratch_floats_, "scratch");
}

void Driver::run_items(const Item* begin, const Item* end, int64_t period) {
  for (const Item* item = begin; item != end; ++item) {
    const ReadyOp& ready = run_.tables.ready_ops()[item->op];
    const int64_t grid = static_cast<int64_t>(ready.op.q_rows) * ready.op.q_cols;
    run_.sites.clear();
    for (int32_t m = 0; m < item->count; ++m) {
      const int64_t q = item->q0 + static_cast<int64_t>(m) * item->qstep + ready.op.advance * period;
      if (q >= 0 && q < grid)
        run_.sites.push_back({static_cast<int32_t>(q / ready.op.q_cols), static_cast<int32_t>(q % ready.op.q_cols)});
    }
    if (!run_.sites.empty()) run_op(ready);
  }
}

// Picks the cheapest way by a rough count of cycles.
const Driver::Split& Driver::split(const ReadyOp& ready, int64_t columns) {
  Split& best = splits_[&ready - run_.tables.ready_ops().data()];
  if (best.for_columns == columns) return best;
  best = Split{columns};
  const int threads = pool_.threads();
  const double panel_bytes = static_cast<double>(ready.op.k) * kPanel * run_.tables.weight_bytes();
  const double bytes = bytes_per_cycle(program_.nweights * run_.tables.weight_bytes());
  const auto linear = [&](int64_t panels, int64_t cols) {
    return panels * std::max(cols * ready.linear_cycles, panel_bytes / bytes);
  };
  const double programs = ready.program_cycles * columns;
  double least = linear(ready.panels, columns) + programs;
  for (int c = 1; c <= threads && c <= columns; ++c) {
    const int64_t part = (columns + c - 1) / c;
    if (c > 1) {
      const double apart = linear(ready.panels, part) + ready.program_cycles * part + kHandOverCycles;
      if (apart < least) least = apart, best.panels = 1, best.columns = c;
    }
    const int p = static_cast<int>(std::min<int64_t>(threads / c, ready.panels));
    if (p > 1) {
      const int64_t programs_of_one = (columns + threads - 1) / threads;
      const double shared = ready.program_cycles * programs_of_one + kHandOverCycles;
      const double by_panels = linear((ready.panels + p - 1) / p, part) + std::min(shared, programs) + kHandOverCycles;
      if (by_panels < least)
        least = by_panels, best.panels = p, best.columns = c, best.share_program = shared < programs;
    }
  }
  return best;
}

void Driver::run_op(const ReadyOp& ready) {
  const int64_t columns = static_cast<int64_t>(run_.sites.size()) * run_.args.slots;
  const Split& s = split(ready, columns);
  if (s.panels > 1)
    run_by_panels(ready, s, columns);
  else
    pool_.run(s.columns, [&](int part) { parts_[part].compute(ready, share(columns, s.columns, part)); });
}

void Driver::run_by_panels(const ReadyOp& ready, const Split& s, int64_t columns) {
  const int64_t block = std::max<int64_t>(scratch_floats_ / ready.stride, 1);
  float* scratch = scratch_.as<float>();
  for (int64_t c = 0; c < columns; c += block) {
    const int64_t n = std::min(block, columns - c);
    pool_.run(s.panels * s.columns, [&](int part) {
      const Range panels = share(ready.panels, s.panels, part % s.panels);
      const Range mine = share(n, s.columns, part / s.panels);
      for (int64_t i = mine.begin; i < mine.end; i += Columns::kBlock)
        parts_[part].linear(ready, {c + i, c + std::min(i + Columns::kBlock, mine.end)}, panels,
                            scratch + i * ready.stride);
    });
    const int parts = s.share_program ? static_cast<int>(std::min<int64_t>(pool_.threads(), n)) : 1;
    pool_.run(parts, [&](int part) {
      const Range mine = share(n, parts, part);
      for (int64_t i = mine.begin; i < mine.end; ++i) parts_[part].program(ready, c + i, scratch + i * ready.stride);
    });
  }
}

void Driver::draw(int64_t step) {
  constexpr int64_t kWorthSharing = 2048;  // parameters; each costs about an exponential
  const int32_t site = static_cast<int32_t>(site_of_step(program_, step));
  const int32_t phase = program_.step_phase[step % program_.period];
  const int64_t slots = run_.args.slots;
  const int64_t wanted = slots * program_.head.params / kWorthSharing + 1;
  const int parts = static_cast<int>(std::min<int64_t>({wanted, slots, pool_.threads()}));
  pool_.run(parts, [&](int part) {
    const Range mine = share(slots, parts, part);
    for (int64_t slot = mine.begin; slot < mine.end; ++slot) parts_[part].draw(step, site, phase, slot);
  });
}

}  // namespace fastgen
