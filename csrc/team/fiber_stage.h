// A stage of fibers: activations to shared memory, the product on the tensor cores, and each slice's program on its
// own sums. A CTA works on a part of the columns and a part of the slices; K is never split between CTAs.
//
//   point      where every place of every column is                          (pointers, once per block of columns)
//   stage      activations, rounded to the precision of the product; the loads of the programs beside them
//   multiply   a warp takes 16 rows, up to 64 columns, and all chunks of K or (few tasks) one; sums of chunks are added
//              in order either way
//   finish     a thread takes a fiber and a column: bias, instructions, stores
#pragma once
#include "fiber_block.h"

namespace fastgen::team {

template <Precision P, class Team>
class FiberStage : FiberBlock<P, Team> {
  using Block = FiberBlock<P, Team>;
  using Block::b_, Block::bias_of, Block::code_, Block::column0_, Block::covered, Block::group_, Block::item_;
  using Block::load, Block::local, Block::n_, Block::partial_, Block::per_column, Block::point, Block::points_;
  using Block::registers, Block::s_, Block::slice0_, Block::stage_activations, Block::whole_k, Block::x_;
  using typename Block::Element;

 public:
  FG_D FiberStage(const Context<Team>& context, const Stage& stage, const StageItem& item)
      : Block(context, stage, item) {}

  FG_D void run() {
    const int columns = item_.count * x_.slots;
    if (columns == 0) return;
    const int blocks = (columns + s_.cols - 1) / s_.cols;
    const int parts = blocks < x_.team.size() ? blocks : x_.team.size();
    const int sharers = x_.team.size() / parts;
    const int part = x_.team.rank() % parts, share = x_.team.rank() / parts;
    if (share >= sharers) return;
    const int first = s_.slices * share / sharers, last = s_.slices * (share + 1) / sharers;
    if (first == last) return;
    for (int block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      column0_ = block * s_.cols;
      n_ = columns - column0_ < s_.cols ? columns - column0_ : s_.cols;
      point();
      x_.team.sync_cta();
      for (slice0_ = first; slice0_ < last; slice0_ += s_.group) {
        group_ = last - slice0_ < s_.group ? last - slice0_ : s_.group;
        run_group(slice0_ == first);
        // The next item begins with a barrier of its own.
        if (slice0_ + group_ < last || block + 1 < blocks * (part + 1) / parts) x_.team.sync_cta();
      }
    }
  }

 private:
  // Weights wait for nobody: a warp's first are on their way before the activations are staged.
  FG_D void run_group(bool first_group) {
    split_ = 0;
    if (s_.nchunks == 0) load();
    for (int chunk = 0; chunk < s_.nchunks; chunk += s_.kblock) {
      const int chunks = s_.nchunks - chunk < s_.kblock ? s_.nchunks - chunk : s_.kblock;
      share_tasks(chunks);
      Ahead ahead;
      if (x_.team.warp() < count_) {
        const Task first = task_at(x_.team.warp());
        ahead.load(first.weights, (chunk + first.which) * s_.chunk, end_of(chunk + first.which), steps_ahead(across_));
      }
      if (first_group || !whole_k()) stage_activations(chunk, chunks);
      if (chunk == 0) load();
      x_.team.sync_cta();
      multiply(chunk, chunks, ahead);
      x_.team.sync_cta();
      if (chunk + chunks == s_.nchunks) break;
      if (split_ > 0) fold(chunk == 0);
      x_.team.sync_cta();
    }
    if (s_.nchunks == 0) x_.team.sync_cta();
    finish();
  }

  static constexpr int kStepBytes = kTileRows * kTileDepth * static_cast<int>(sizeof(Element));

  // The next k-steps of weights of a warp's tile, on their way at once.
  struct Ahead {
    static constexpr int kSteps = P == kFloat32 ? 1 : 8;
    Weights<P> step[kSteps];

    FG_D void load(const char* weights, int from, int to, int most) {
      FG_UNROLL_ALL for (int u = 0; u < kSteps; ++u) if (u < most && from + u < to) step[u].load(
          weights + static_cast<int64_t>(from + u) * kStepBytes);
    }
  };

  // As many as leave registers for the sums of so many tiles of columns.
  static FG_D constexpr int steps_ahead(int column_tiles) { return P == kFloat32 ? 1 : column_tiles <= 2 ? 8 : 4; }
  static constexpr int kMostColumnTiles = P == kFloat32 ? 4 : 8;  // that a warp takes at once

  // What a warp does at a time: a tile of rows, some tiles of columns, and one chunk (split) or all.
  struct Task {
    int which, slice, row0, column0;
    const char* weights;
  };

  FG_D void share_tasks(int chunks) {
    const int column_tiles = covered() / kTileCols;
    across_ = column_tiles < kMostColumnTiles ? column_tiles : kMostColumnTiles;
    tasks_ = group_ * (local() / kTileRows) * (column_tiles / across_);
    const int room = (x_.h.work_bytes - s_.at_p) / static_cast<int>(sizeof(float));
    split_ = chunks > 1 && tasks_ < x_.team.warps() && chunks * s_.ldp * covered() <= room ? chunks : 0;
    count_ = split_ > 0 ? tasks_ * chunks : tasks_;
  }

  FG_D Task task_at(int task) const {
    const int tiles = local() / kTileRows, parts = covered() / (across_ * kTileCols);
    Task t;
    t.which = split_ > 0 ? task / tasks_ : 0;
    const int rest = task - t.which * tasks_, tile = parts == 1 ? rest : rest / parts;
    t.column0 = (rest - tile * parts) * across_ * kTileCols;
    t.slice = tiles == 1 ? tile : tile / tiles, t.row0 = (tile - t.slice * tiles) * kTileRows;
    t.weights = x_.weights + s_.weights + static_cast<int64_t>(slice0_ * tiles + tile) * s_.ksteps * kStepBytes;
    return t;
  }

  FG_D int end_of(int chunk) const { return (chunk + 1) * s_.chunk < s_.ksteps ? (chunk + 1) * s_.chunk : s_.ksteps; }

  FG_D void multiply(int chunk, int chunks, Ahead& ahead) {
    switch (across_) {
      case 1: return multiply_by<1>(chunk, chunks, ahead);
      case 2: return multiply_by<2>(chunk, chunks, ahead);
      case 4: return multiply_by<4>(chunk, chunks, ahead);
      default: return multiply_by<kMostColumnTiles>(chunk, chunks, ahead);
    }
  }

  // NT: tiles of columns a warp takes at once. Sums of all chunks by one warp go to the registers; sums of single
  // chunks to `partial_`, to be added by add_chunks(). ahead: the first weights of this warp's first task.
  template <int NT>
  FG_D void multiply_by(int chunk, int chunks, Ahead& ahead) {
    for (int task = x_.team.warp(); task < count_; task += x_.team.warps()) {
      const Task t = task_at(task);
      bool ready = task == x_.team.warp();
      Sums<NT> total;
      if (split_ > 0) {
        sum_chunk<NT>(total, t, chunk, t.which, ahead, ready);
        total.each([&](int row, int column, float& sum) {
          partial_[(t.which * covered() + t.column0 + column) * s_.ldp + t.slice * local() + t.row0 + row] = sum;
        });
        continue;
      }
      if (chunk == 0)
        sum_chunk<NT>(total, t, 0, 0, ahead, ready), ready = false;
      else
        total.each(
            [&](int row, int column, float& sum) { sum = registers(t.slice, t.column0 + column)[t.row0 + row]; });
      for (int c = chunk == 0 ? 1 : 0; c < chunks; ++c, ready = false) {
        Sums<NT> next;
        sum_chunk<NT>(next, t, chunk, c, ahead, ready);
        total.add(next);
      }
      const bool add = s_.bias >= 0 && whole_k();
      total.each([&](int row, int column, float& sum) {
        float* to = registers(t.slice, t.column0 + column) + t.row0 + row;
        *to = add ? *to + sum : sum;
      });
    }
  }

  // Chunk `which` of the block of chunks that begins with `chunk`. ready: `ahead` holds its first weights.
  template <int NT>
  FG_D void sum_chunk(Sums<NT>& sums, const Task& t, int chunk, int which, Ahead& ahead, bool ready) const {
    sums.clear();
    const int from = (chunk + which) * s_.chunk, to = end_of(chunk + which);
    const Element* x = b_ + t.column0 * s_.ldb + which * s_.chunk * kTileDepth;
    constexpr int kSteps = steps_ahead(NT);
    for (int step = from; step < to; step += kSteps) {
      if (!ready || step > from) ahead.load(t.weights, step, to, kSteps);
      FG_UNROLL_ALL for (int u = 0; u < kSteps; ++u) if (step + u < to)
          multiply_step<P, NT>(sums, ahead.step[u], x + (step + u - from) * kTileDepth, s_.ldb);
    }
  }

  // The chunks' sums of one fiber and row, in order, after `before`.
  FG_D float add_chunks(int fiber, int slice, int column, int j, bool first, float before) const {
    const int stride = covered() * s_.ldp;
    const float* p = partial_ + column * s_.ldp + slice * local() + j * s_.width + fiber;
    float sum = first ? p[0] : before + p[0];
    for (int c = 1; c < split_; ++c) sum += p[c * stride];
    return sum;
  }

  FG_D void fold(bool first) {
    x_.for_each(group_ * n_ * s_.width, [&](int i) {
      const int fiber = i % s_.width, rest = i / s_.width, slice = per_column(rest), column = rest - slice * n_;
      float* mine = registers(slice, column) + fiber;
      for (int j = 0; j < s_.rows; ++j)
        mine[j * s_.width] = add_chunks(fiber, slice, column, j, first, mine[j * s_.width]);
    });
  }

  FG_D void finish() {
    const int width = s_.width;
    x_.for_each(group_ * n_ * width, [&](int i) {
      const int fiber = i % width, rest = i / width, slice = per_column(rest), column = rest - slice * n_;
      float* mine = registers(slice, column) + fiber;
      for (int j = 0; j < s_.rows; ++j) mine[j * width] = finished(mine[j * width], fiber, slice, column, j);
      const int f = (slice0_ + slice) * width + fiber;
      Instr next = code_[s_.nloads];  // there is always room behind the last
      for (int k = s_.nloads; k < s_.ncode; ++k) {
        const Instr in = next;
        next = code_[k + 1];
        execute(in, f, mine, column);
      }
    });
  }

  // Bias plus the sum of all chunks. In the register so far: the bias (whole_k), its sum with that of the chunks
  // (whole_k, not split), or the sum of chunks so far.
  FG_D float finished(float so_far, int fiber, int slice, int column, int j) const {
    const bool bias = s_.bias >= 0;
    if (s_.nchunks == 0) return bias ? so_far : 0.0f;
    if (whole_k()) {
      if (split_ == 0) return so_far;
      const float sum = add_chunks(fiber, slice, column, j, true, 0.0f);
      return bias ? so_far + sum : sum;
    }
    const float sum = split_ > 0 ? add_chunks(fiber, slice, column, j, false, so_far) : so_far;
    return bias ? bias_of(slice, fiber, j) + sum : sum;
  }

  FG_D void execute(const Instr& in, int f, float* mine, int column) const {
    if (f < in.lo || f >= in.hi) return;
    const int lane = (f - in.lo) * in.step;
    const auto operand = [&](int32_t r) { return r >= 0 ? mine[r * s_.width] : x_.consts[~r + lane]; };
    const float a = in.fn == kFill ? 0.0f : operand(in.a);
    if (in.fn == kStore) {
      float* to = points_[in.b * s_.cols + column];
      if (to != nullptr) to[in.c + lane] = a;
      return;
    }
    float* to = mine + in.dst * s_.width;
    if (in.fn == kEmbed) {
      const float row = a > 0 ? minimum(a, in.imm0 - 1) : 0;  // NaN: row 0
      *to = x_.consts[in.b + static_cast<int64_t>(row) * in.c + lane];
      return;
    }
    const float b = in.operands > 1 ? operand(in.b) : 0.0f, c = in.operands > 2 ? operand(in.c) : 0.0f;
    *to = map_of(in.fn, a, b, c, &in.imm0);
  }

  int across_ = 1;             // tiles of columns of a task
  int tasks_ = 0, count_ = 0;  // tasks; and with chunks apart
  int split_ = 0;              // chunks, if they are apart
};

}  // namespace fastgen::team
