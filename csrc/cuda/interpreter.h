// The interpreter of a lowered program: one source for the GPU, where a team is a CTA, a cluster or the whole grid, and
// for the host, where it is a few threads (teams.cuh, host_team.h). A Team has
//
//   index()            which team this is; rank(), size(): this CTA's number in it, how many there are
//   warp(), warps()    this thread's warp in the CTA, how many there are
//   shared()           the CTA's shared memory
//   sync_warp(), sync_cta()
//   sync()             barrier of the team; false: a partner was lost, and everybody leaves
//   at(step, op)       where the next barrier is, to say so if it fails
//   peek(), post()     words that others write, or that others read, meanwhile; post_to_host() for the host
//
// All CTAs walk the same schedule. A CTA may run ahead of the others up to the next barrier, and the tables say where
// those must be (StageItem::sync). What the bytes of a sample depend on is the program and the precision, not the
// team: every sum has one order.
#pragma once
#include "column_stage.h"
#include "draw_stage.h"
#include "fiber_stage.h"

namespace fastgen::team {

template <Precision P, class Team>
class Interpreter {
 public:
  FG_D Interpreter(Team& team, const Launch& launch) : team_(team), a_(launch), x_(team, launch) {}

  FG_D void run() {
    if (x_.slots == 0) return report(x_.h.steps);
    begin();
    if (!meet(0, -1)) return;
    const Header& h = x_.h;
    const int32_t* row_ptr = x_.template table<int32_t>(h.row_ptr);
    const int32_t* step_ptr = x_.template table<int32_t>(h.step_ptr);
    const int32_t* step_site = x_.template table<int32_t>(h.step_site);
    const bool whole = h.period >= h.steps;  // a repeating schedule is that of a sequence
    int32_t phase = 0;                       // step % period
    for (int64_t step = 0; step < h.steps; ++step) {
      if (phase % h.row_len == 0) {
        const int32_t row = phase / h.row_len;
        if (!run_items(step, h.row_items, row_ptr[row], row_ptr[row + 1])) return;
      }
      if (!run_items(step, h.step_items, step_ptr[phase], step_ptr[phase + 1])) return;
      DrawStage<Team>(x_).run(step, whole ? step_site[phase] : static_cast<int32_t>(step / h.head.phases));
      if (first_thread() && team_.peek(a_.cancel) != 0) team_.post(a_.stop + team_.index(), 1);
      if (!meet(step, -1)) return;
      if ((step + 1) % h.row_len == 0 || step + 1 == h.steps) report(step + 1);
      if (team_.peek(a_.stop + team_.index()) != 0) return;
      if (++phase == h.period) phase = 0, ++x_.period;
    }
  }

 private:
  FG_D bool first_thread() const { return team_.rank() == 0 && team_.warp() == 0 && team_.lane() == 0; }

  // The input before the first step: zeros, and `start` at the first site.
  FG_D void begin() {
    const Head& h = x_.h.head;
    const Buffer& b = x_.buffers[h.input];
    const int64_t size = static_cast<int64_t>(b.ring_rows) * b.ring_cols * b.channels;
    const int width = h.start < 0 ? 0 : h.channels * h.enc;
    for (int s = team_.rank(); s < x_.slots; s += team_.size()) {
      float* input = a_.arena + (x_.slot0 + s) * a_.arena_stride + b.offset;
      x_.for_each(static_cast<int>(size), [&](int i) { input[i] = i < width ? x_.consts[h.start + i] : 0.0f; });
    }
  }

  FG_D bool meet(int64_t step, int32_t op) {
    team_.at(step, op);
    return team_.sync();
  }

  FG_D bool run_items(int64_t step, int64_t table, int32_t begin, int32_t end) {
    const StageItem* items = x_.template table<StageItem>(table);
    for (int32_t i = begin; i < end; ++i) {
      const StageItem& item = items[i];
      const Stage& stage = x_.stages[item.stage];
      if (item.sync && !meet(step, stage.op)) return false;
      if (stage.kind == kFibers)
        FiberStage<P, Team>(x_, stage, item).run();
      else
        ColumnStage<Team>(x_, stage, item).run();
    }
    return begin == end || meet(step, -1);
  }

  FG_D void report(int64_t steps) {
    if (first_thread()) team_.post_to_host(&a_.control[team_.index()].done, static_cast<uint32_t>(steps));
  }

  Team& team_;
  const Launch& a_;
  Context<Team> x_;
};

}  // namespace fastgen::team
