// What a CTA holds of a stage of fibers in shared memory, for a block of columns and a group of slices: where each
// column's places are, its activations for the product, the registers of its fibers, and partial sums.
#pragma once
#include "context.h"
#include "maps.h"

namespace fastgen::team {

template <Precision P, class Team>
class FiberBlock {
 protected:
  using Element = typename Operand<P>::Type;

  FG_D FiberBlock(const Context<Team>& context, const Stage& stage, const StageItem& item)
      : x_(context),
        s_(stage),
        item_(item),
        places_(behind<Place>(stage, stage.places)),
        code_(behind<Instr>(stage, stage.code)),
        points_(x_.template shared<float*>(0)),
        b_(x_.template shared<Element>(s_.at_b)),
        registers_(x_.template shared<float>(s_.at_s)),
        partial_(x_.template shared<float>(s_.at_p)) {}

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
    // Zeros where K is rounded up: there weights are zero, and must not meet a NaN. The columns that only fill a tile
    // may hold anything: nobody looks at their sums.
    const int rest = to - end;
    x_.for_each(rest * n_, [&](int i) { b_[i / rest * s_.ldb + end - from + i % rest] = Element(0); });
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
};

}  // namespace fastgen::team
