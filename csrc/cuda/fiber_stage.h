// A stage of fibers: activations to shared memory, the product on the tensor cores, and each slice's program on its
// own sums. A CTA works on a part of the columns and a part of the slices; K is never split between CTAs.
//
//   point      where every place of every column is                          (pointers, once per block of columns)
//   stage      activations, rounded to the precision of the product; the loads of the programs beside them
//   multiply   a warp takes 16 rows, up to 64 columns, and all chunks of K or (few tasks) one; sums of chunks are added
//              in order either way
//   finish     a thread takes a fiber and a column: bias, instructions, stores
#pragma once
#include "context.h"
#include "functions.h"

namespace fastgen::team {

template <Precision P, class Team>
class FiberStage {
  using Element = typename Operand<P>::Type;

 public:
  FG_D FiberStage(const Context<Team>& context, const Stage& stage, const StageItem& item)
      : x_(context),
        s_(stage),
        item_(item),
        places_(behind<Place>(stage, stage.places)),
        code_(behind<Instr>(stage, stage.code)),
        points_(x_.template shared<float*>(0)),
        b_(x_.template shared<Element>(s_.at_b)),
        registers_(x_.template shared<float>(s_.at_s)),
        partial_(x_.template shared<float>(s_.at_p)) {}

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
      }
    }
  }

 private:
  FG_D int local() const { return s_.rows * s_.width; }
  FG_D bool whole_k() const { return s_.nchunks <= s_.kblock; }
  FG_D float bias_of(int slice, int fiber, int j) const {
    return x_.consts[s_.bias + (slice0_ + slice) * local() + j * s_.width + fiber];
  }
  FG_D float* registers(int slice, int column) const { return registers_ + (slice * s_.cols + column) * s_.lds; }

  // i / n_, which is often i.
  FG_D int per_column(int i) const { return n_ == 1 ? i : i / n_; }

  FG_D void point() {
    x_.for_each(s_.nplaces * n_, [&](int i) {
      const int place = per_column(i), column = i - place * n_;
      points_[place * s_.cols + column] = x_.place(s_, item_, places_[place], column0_ + column);
    });
  }

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
    x_.team.sync_cta();
  }

  // ---- activations ----
  // Columns the tiles of a multiplication cover: the next power of two of tiles.
  FG_D int covered() const {
    int tiles = 1;
    while (tiles * kTileCols < n_) tiles *= 2;
    return tiles * kTileCols;
  }

  FG_D void stage_activations(int chunk, int chunks) {
    const int from = chunk * s_.chunk * kTileDepth;
    int to = from + chunks * s_.chunk * kTileDepth;
    if (to > s_.ksteps * kTileDepth) to = s_.ksteps * kTileDepth;
    const int end = to < s_.k ? to : s_.k;
    constexpr int kPiece = 4 * kLanes, kFlight = 4;  // channels of a warp's load; loads in flight
    const int pieces = (s_.widest + kPiece - 1) / kPiece, units = s_.ntaps * n_ * pieces;
    const int warps = x_.team.warps();
    for (int base = x_.team.warp(); base < units; base += warps * kFlight)
      for_lanes([&](int lane) {
        Unit unit[kFlight];
        Quad value[kFlight];
        FG_UNROLL_ALL for (int u = 0; u < kFlight; ++u) unit[u] =
            unit_at(base + u * warps, units, pieces, lane, from, end);
        FG_UNROLL_ALL for (int u = 0; u < kFlight; ++u) value[u] = fetch(unit[u]);
        FG_UNROLL_ALL for (int u = 0; u < kFlight; ++u) keep(unit[u], from, value[u]);
      });
    // Zeros where K is rounded up, and in the columns that only fill a tile.
    const int rest = to - end, depth = to - from, spare = covered() - n_;
    x_.for_each(rest * n_, [&](int i) { b_[i / rest * s_.ldb + end - from + i % rest] = Element(0); });
    x_.for_each(depth * spare, [&](int i) { b_[(n_ + i / depth) * s_.ldb + i % depth] = Element(0); });
  }

  // 4 channels a lane of one tap and one column, of which [lo, hi) (within K) are wanted.
  struct Unit {
    const float* from;
    int column, k, lo, hi;
  };

  FG_D Unit unit_at(int u, int units, int pieces, int lane, int from, int end) const {
    Unit w = {nullptr, 0, 0, 0, 0};
    if (u >= units) return w;
    const int whole = pieces == 1 ? u : u / pieces, piece = u - whole * pieces, tap = per_column(whole);
    w.column = whole - tap * n_;
    const int offset = places_[tap].k, nchan = places_[tap].nchan;
    const int channel = (piece * kLanes + lane) * 4;
    w.k = offset + channel;
    w.lo = w.k < from ? from : w.k;
    w.hi = offset + nchan < end ? offset + nchan : end;
    if (w.hi > w.k + 4) w.hi = w.k + 4;
    const float* base = points_[tap * s_.cols + w.column];
    w.from = base == nullptr ? nullptr : base + channel;
    return w;
  }

  FG_D static bool wanted(const Unit& w, int e) { return w.k + e >= w.lo && w.k + e < w.hi; }

  FG_D Quad fetch(const Unit& w) const {
    Quad q = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (w.lo >= w.hi || w.from == nullptr) return q;
    if (w.hi - w.lo == 4 && reinterpret_cast<uintptr_t>(w.from) % 16 == 0) return read_quad(w.from);
    FG_UNROLL_ALL for (int e = 0; e < 4; ++e) if (wanted(w, e)) q.v[e] = read_state(w.from + e);
    return q;
  }

  FG_D void keep(const Unit& w, int from, const Quad& q) const {
    if (w.lo >= w.hi) return;
    struct alignas(4 * sizeof(Element)) Four {
      Element v[4];
    } four;
    FG_UNROLL_ALL for (int e = 0; e < 4; ++e) four.v[e] = to_operand<P>(q.v[e]);
    Element* to = b_ + w.column * s_.ldb + w.k - from;
    if (w.hi - w.lo == 4 && (w.k - from) % 4 == 0) {  // columns are aligned
      *reinterpret_cast<Four*>(to) = four;
      return;
    }
    FG_UNROLL_ALL for (int e = 0; e < 4; ++e) if (wanted(w, e)) to[e] = four.v[e];
  }

  // The loads of the programs, and the bias, in the first registers: four numbers of a thread on their way at once. By
  // the last warps; the first are busy with the activations.
  FG_D void load() {
    const int width = s_.width, rows = s_.bias >= 0 && whole_k() ? s_.rows : 0, count = rows + s_.nloads;
    if (count == 0) return;
    x_.for_each_from_last(group_ * n_ * width, [&](int i) {
      const int fiber = i % width, rest = i / width, slice = per_column(rest), column = rest - slice * n_;
      const int f = (slice0_ + slice) * width + fiber;
      float* mine = registers(slice, column) + fiber;
      for (int base = 0; base < count; base += 4) {
        float value[4];
        int to[4];
        FG_UNROLL_ALL for (int u = 0; u < 4; ++u) {
          const int k = base + u;
          to[u] = -1;
          if (k < rows)
            value[u] = bias_of(slice, fiber, k), to[u] = k;
          else if (k < count)
            to[u] = loaded(code_[k - rows], f, column, &value[u]);
        }
        FG_UNROLL_ALL for (int u = 0; u < 4; ++u) if (to[u] >= 0) mine[to[u] * width] = value[u];
      }
    });
  }

  // The register that a load fills, -1: not of this fiber.
  FG_D int loaded(const Instr& in, int f, int column, float* value) const {
    if (f < in.lo || f >= in.hi) return -1;
    const float* from = points_[in.a * s_.cols + column];
    *value = from == nullptr ? in.imm0 : read_state(from + in.c + (f - in.lo) * in.step);
    return in.dst;
  }

  // ---- product ----
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

  // ---- programs ----
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
    const int count = operands_of(in.fn);
    const float b = count > 1 ? operand(in.b) : 0.0f, c = count > 2 ? operand(in.c) : 0.0f;
    *to = map_of(in.fn, a, b, c, &in.imm0);
  }

  const Context<Team>& x_;
  const Stage s_;  // a copy: what is stored below could otherwise change it, to a compiler
  const StageItem& item_;
  const Place* places_;
  const Instr* code_;
  float** points_;    // [place][column]
  Element* b_;        // [column][K of the block]
  float* registers_;  // [slice of the group][column][register][fiber]
  float* partial_;    // [chunk][column][row of the group]
  int column0_ = 0, n_ = 0, slice0_ = 0, group_ = 0;
  int across_ = 1, tasks_ = 0, count_ = 0,
      split_ = 0;  // column tiles of a task; tasks, and those with chunks apart; chunks apart
};

}  // namespace fastgen::team
