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

  FG_D void point() {
    x_.for_each(s_.nplaces * n_, [&](int i) {
      const int place = i / n_, column = i - place * n_;
      points_[place * s_.cols + column] = x_.place(s_, item_, places_[place], column0_ + column);
    });
  }

  FG_D void run_group(bool first_group) {
    load();
    split_ = 0;
    for (int chunk = 0; chunk < s_.nchunks; chunk += s_.kblock) {
      const int chunks = s_.nchunks - chunk < s_.kblock ? s_.nchunks - chunk : s_.kblock;
      if (first_group || s_.kblock < s_.nchunks) stage_activations(chunk, chunks);
      x_.team.sync_cta();
      multiply(chunk, chunks);
      x_.team.sync_cta();
      if (chunk + chunks == s_.nchunks) break;
      if (split_ > 0) fold(chunk == 0);
      x_.team.sync_cta();
    }
    if (s_.nchunks == 0) x_.team.sync_cta();
    finish();
    x_.team.sync_cta();
  }

  // ---- activations
  // ----------------------------------------------------------------------------------------------------- Columns the
  // tiles of a multiplication cover: the next power of two of tiles.
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
    for (int base = x_.team.warp() * kFlight; base < units; base += x_.team.warps() * kFlight)
      for_lanes([&](int lane) {
        Quad value[kFlight];
        FG_UNROLL_ALL for (int u = 0; u < kFlight; ++u) value[u] = fetch(base + u, units, pieces, lane, from, end);
        FG_UNROLL_ALL for (int u = 0; u < kFlight; ++u) keep(base + u, units, pieces, lane, from, end, value[u]);
      });
    // Zeros where K is rounded up, and in the columns that only fill a tile.
    const int rest = to - end, depth = to - from, spare = covered() - n_;
    x_.for_each(rest * n_, [&](int i) { b_[i / rest * s_.ldb + end - from + i % rest] = Element(0); });
    x_.for_each(depth * spare, [&](int i) { b_[(n_ + i / depth) * s_.ldb + i % depth] = Element(0); });
  }

  // Unit u: 4 channels a lane of one tap and one column, of which [lo, hi) (within K) are wanted.
  struct Unit {
    const float* from;
    int column, k, lo, hi;
  };

  FG_D bool unit(int u, int units, int pieces, int lane, int from, int end, Unit* out) const {
    if (u >= units) return false;
    const int piece = u % pieces, tap = u / pieces / n_;
    out->column = u / pieces - tap * n_;
    const int offset = places_[tap].k, nchan = places_[tap].nchan;
    const int channel = (piece * kLanes + lane) * 4;
    out->k = offset + channel;
    out->lo = out->k < from ? from : out->k;
    out->hi = offset + nchan < end ? offset + nchan : end;
    if (out->hi > out->k + 4) out->hi = out->k + 4;
    const float* base = points_[tap * s_.cols + out->column];
    out->from = base == nullptr ? nullptr : base + channel;
    return out->lo < out->hi;
  }

  FG_D Quad fetch(int u, int units, int pieces, int lane, int from, int end) const {
    Quad q = {{0.0f, 0.0f, 0.0f, 0.0f}};
    Unit w;
    if (!unit(u, units, pieces, lane, from, end, &w) || w.from == nullptr) return q;
    if (w.hi - w.lo == 4 && reinterpret_cast<uintptr_t>(w.from) % 16 == 0) return read_quad(w.from);
    FG_UNROLL_ALL for (int e = 0; e < 4; ++e) if (w.k + e >= w.lo && w.k + e < w.hi) q.v[e] = read_state(w.from + e);
    return q;
  }

  FG_D void keep(int u, int units, int pieces, int lane, int from, int end, const Quad& q) const {
    Unit w;
    if (!unit(u, units, pieces, lane, from, end, &w)) return;
    Element* to = b_ + w.column * s_.ldb + w.k - from;
    FG_UNROLL_ALL for (int e = 0; e < 4; ++e) if (w.k + e >= w.lo && w.k + e < w.hi) to[e] = to_operand<P>(q.v[e]);
  }

  // The loads of the programs, and the bias: all that is read from far away is on its way at once.
  FG_D void load() {
    const bool bias = s_.bias >= 0 && whole_k();
    if (s_.nloads == 0 && !bias) return;
    const int width = s_.width;
    x_.for_each(group_ * n_ * width, [&](int i) {
      const int fiber = i % width, column = i / width % n_, slice = i / width / n_;
      const int f = (slice0_ + slice) * width + fiber;
      float* mine = registers(slice, column) + fiber;
      for (int j = 0; bias && j < s_.rows; ++j) mine[j * width] = bias_of(slice, fiber, j);
      for (int k = 0; k < s_.nloads; ++k) {
        const Instr& in = code_[k];
        if (f < in.lo || f >= in.hi) continue;
        const float* from = points_[in.a * s_.cols + column];
        mine[in.dst * width] = from == nullptr ? in.imm0 : read_state(from + in.c + (f - in.lo) * in.step);
      }
    });
  }

  // ---- product
  // ---------------------------------------------------------------------------------------------------------
  FG_D void multiply(int chunk, int chunks) {
    switch (covered() / kTileCols) {
      case 1: return multiply_by<1>(chunk, chunks);
      case 2: return multiply_by<2>(chunk, chunks);
      case 4: return multiply_by<4>(chunk, chunks);
      default: return multiply_by<P == kFloat32 ? 4 : 8>(chunk, chunks);
    }
  }

  // NT: tiles of 8 columns a warp takes at once. Sums of all chunks by one warp go to the registers; sums of single
  // chunks to `partial_`, to be added by add_chunks().
  template <int NT>
  FG_D void multiply_by(int chunk, int chunks) {
    const int tiles = local() / kTileRows, across = covered() / (NT * kTileCols), tasks = group_ * tiles * across;
    const int room = (x_.h.work_bytes - s_.at_p) / static_cast<int>(sizeof(float));
    const bool split = chunks > 1 && tasks < x_.team.warps() && chunks * s_.ldp * covered() <= room;
    split_ = split ? chunks : 0;
    const int count = split ? tasks * chunks : tasks;
    for (int task = x_.team.warp(); task < count; task += x_.team.warps()) {
      const int which = split ? task / tasks : 0, rest = split ? task - which * tasks : task;
      const int tile = rest / across, column0 = (rest - tile * across) * NT * kTileCols;
      const int slice = tile / tiles, row0 = (tile - slice * tiles) * kTileRows;
      const char* weights =
          x_.weights + s_.weights + static_cast<int64_t>(slice0_ * tiles + tile) * s_.ksteps * kStepBytes;
      Sums<NT> total;
      if (split) {
        sum_chunk<NT>(total, weights, column0, chunk, which);
        total.each([&](int row, int column, float& sum) {
          partial_[(which * covered() + column0 + column) * s_.ldp + slice * local() + row0 + row] = sum;
        });
        continue;
      }
      if (chunk == 0)
        sum_chunk<NT>(total, weights, column0, 0, 0);
      else
        total.each([&](int row, int column, float& sum) { sum = registers(slice, column0 + column)[row0 + row]; });
      for (int c = chunk == 0 ? 1 : 0; c < chunks; ++c) {
        Sums<NT> next;
        sum_chunk<NT>(next, weights, column0, chunk, c);
        total.add(next);
      }
      const bool add = s_.bias >= 0 && whole_k();
      total.each([&](int row, int column, float& sum) {
        float* to = registers(slice, column0 + column) + row0 + row;
        *to = add ? *to + sum : sum;
      });
    }
  }

  static constexpr int kStepBytes = kTileRows * kTileDepth * static_cast<int>(sizeof(Element));

  // Chunk `which` of the block of chunks that begins with `chunk`.
  template <int NT>
  FG_D void sum_chunk(Sums<NT>& sums, const char* weights, int column0, int chunk, int which) const {
    sums.clear();
    const int from = (chunk + which) * s_.chunk;
    const int to = from + s_.chunk < s_.ksteps ? from + s_.chunk : s_.ksteps;
    const Element* x = b_ + column0 * s_.ldb + which * s_.chunk * kTileDepth;
    constexpr int kAhead = P == kFloat32 ? 1 : NT <= 2 ? 8 : 4;  // k-steps of weights on their way at once
    for (int step = from; step < to; step += kAhead) {
      Weights<P> ahead[kAhead];
      FG_UNROLL_ALL for (int u = 0; u < kAhead; ++u) if (step + u < to) ahead[u].load(
          weights + static_cast<int64_t>(step + u) * kStepBytes);
      FG_UNROLL_ALL for (int u = 0; u < kAhead; ++u) if (step + u < to)
          multiply_step<P, NT>(sums, ahead[u], x + (step + u - from) * kTileDepth, s_.ldb);
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
      const int fiber = i % s_.width, column = i / s_.width % n_, slice = i / s_.width / n_;
      float* mine = registers(slice, column) + fiber;
      for (int j = 0; j < s_.rows; ++j)
        mine[j * s_.width] = add_chunks(fiber, slice, column, j, first, mine[j * s_.width]);
    });
  }

  // ---- programs
  // --------------------------------------------------------------------------------------------------------
  FG_D void finish() {
    const int width = s_.width;
    x_.for_each(group_ * n_ * width, [&](int i) {
      const int fiber = i % width, column = i / width % n_, slice = i / width / n_;
      float* mine = registers(slice, column) + fiber;
      for (int j = 0; j < s_.rows; ++j) mine[j * width] = finished(mine[j * width], fiber, slice, column, j);
      const int f = (slice0_ + slice) * width + fiber;
      for (int k = s_.nloads; k < s_.ncode; ++k) execute(code_[k], f, mine, column);
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
  const Stage& s_;
  const StageItem& item_;
  const Place* places_;
  const Instr* code_;
  float** points_;    // [place][column]
  Element* b_;        // [column][K of the block]
  float* registers_;  // [slice of the group][column][register][fiber]
  float* partial_;    // [chunk][column][row of the group]
  int column0_ = 0, n_ = 0, slice0_ = 0, group_ = 0, split_ = 0;
};

}  // namespace fastgen::team
