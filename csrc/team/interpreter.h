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
// All CTAs walk the same schedule. A CTA may run ahead of the others up to the next barrier, and the items say where
// those must be. What the bytes of a sample depend on is the program and the precision, not the
// team: every sum has one order.
#pragma once
#include "column_stage.h"
#include "draw_stage.h"
#include "fiber_stage.h"

namespace fastgen::team {

// What stages are made of is brought to shared memory while the stage before is at work (a barrier empties the
// first-level cache, so that every table read from afar would cost a trip to the second level).
template <Precision P, class Team>
class Interpreter {
 public:
  FG_D Interpreter(Team& team, const Launch& launch) : team_(team), a_(launch), x_(team, launch) {}

  FG_D void run() {
    if (!begin()) return;
    int64_t step = 0;
    int32_t at = 0;                            // of the items of a period
    int32_t next = kItemsAhead % x_.h.nitems;  // the first that is not in shared memory
    for (uint32_t count = 0; step < x_.h.steps; ++count) {
      const StageItem item = *ring(count);
      wait_copies();
      if (!(item.sync ? meet(step, item.op) : sync_cta())) return;
      if (item.first && step > 0 && !between(step)) return;
      fetch(count, next);
      execute(item, count, step);
      if (item.op < 0) ++step;
      if (++at == x_.h.nitems) at = 0, ++x_.period;
      next = next + 1 == x_.h.nitems ? 0 : next + 1;
    }
    wait_copies();
    if (meet(step, -1)) between(step);
  }

 private:
  FG_D bool first_thread() const { return team_.rank() == 0 && team_.warp() == 0 && team_.lane() == 0; }
  FG_D StageItem* ring(uint32_t count) const {
    return reinterpret_cast<StageItem*>(team_.shared() + kItemsAt) + count % kItemRing;
  }
  FG_D char* descriptor(uint32_t count) const {
    return team_.shared() + kDescriptorsAt + count % 2 * x_.h.descriptor_bytes;
  }

  FG_D bool meet(int64_t step, int32_t op) {
    team_.at(step, op);
    return team_.sync();
  }
  FG_D bool sync_cta() {
    team_.sync_cta();
    return true;
  }

  // Header, first items and first descriptor to shared memory; the input before the first step: zeros, and `start` at
  // the first site.
  FG_D bool begin() {
    x_.copy(team_.shared(), a_.block, kHeaderBytes);
    wait_copies();
    team_.sync_cta();
    if (x_.slots == 0) {
      report(x_.h.steps);
      return false;
    }
    const char* items = a_.block + x_.h.items;
    for (int i = 0; i < kItemsAhead; ++i)
      x_.copy(reinterpret_cast<char*>(ring(i)), items + i % x_.h.nitems * sizeof(StageItem), sizeof(StageItem));
    wait_copies();
    team_.sync_cta();
    fetch_descriptor(0);
    const Head& h = x_.h.head;
    const Place& input = x_.h.input;
    const int size = input.ring_rows * input.ring_cols * input.channels, width = h.start < 0 ? 0 : h.channels * h.enc;
    for (int s = team_.rank(); s < x_.slots; s += team_.size()) {
      float* to = a_.arena + (x_.slot0 + s) * a_.arena_stride + input.offset;
      x_.for_each(size, [&](int i) { to[i] = i < width ? x_.consts[h.start + i] : 0.0f; });
    }
    return true;  // the first item begins with a barrier
  }

  // On their way after this: the item after the next, and the descriptor of the next.
  FG_D void fetch(uint32_t count, int32_t next) {
    const char* items = a_.block + x_.h.items;
    x_.copy(reinterpret_cast<char*>(ring(count + kItemsAhead)), items + next * sizeof(StageItem), sizeof(StageItem));
    fetch_descriptor(count + 1);
  }

  FG_D void fetch_descriptor(uint32_t count) {
    const StageItem& item = *ring(count);
    x_.copy(descriptor(count), a_.block + x_.h.descriptors + static_cast<int64_t>(item.descriptor) * 16, item.bytes);
  }

  FG_D void execute(const StageItem& item, uint32_t count, int64_t step) {
    const Stage& stage = *reinterpret_cast<const Stage*>(descriptor(count));
    if (stage.kind == kFibers) {
      FiberStage<P, Team>(x_, stage, item).run();
    } else if (stage.kind == kColumns) {
      ColumnStage<Team>(x_, stage, item).run();
    } else {
      const bool cancelled = first_thread() && team_.peek(a_.cancel) != 0;
      DrawStage<Team>(x_, stage).run(step, static_cast<int32_t>(item.q0 + x_.period * item.qstep));
      if (cancelled) post_stop(step + 1);
    }
  }

  // A team stops after the step it was told in, not before: a CTA that looks late must see what the others saw, though
  // the first may have drawn again meanwhile.
  FG_D void post_stop(int64_t steps) {
    uint32_t* stop = a_.stop + team_.index();
    if (team_.peek(stop) == 0) team_.post(stop, static_cast<uint32_t>(steps));
  }

  // After the barrier behind a step's draw: progress; false: cancelled.
  FG_D bool between(int64_t steps) {
    if (steps % x_.h.row_len == 0 || steps == x_.h.steps) report(steps);
    const uint32_t stop = team_.peek(a_.stop + team_.index());
    return stop == 0 || static_cast<int64_t>(stop) > steps;
  }

  FG_D void report(int64_t steps) {
    if (first_thread()) team_.post_to_host(&a_.control[team_.index()].done, static_cast<uint32_t>(steps));
  }

  Team& team_;
  const Launch& a_;
  Context<Team> x_;
};

}  // namespace fastgen::team
