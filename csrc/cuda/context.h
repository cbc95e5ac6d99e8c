// What all parts of one team's run share: the tables, the call, and where numbers lie.
#pragma once
#include "warp.h"

namespace fastgen::team {

// Activations were written by other CTAs: past the first-level cache, which does not see that.
FG_D float read_state(const float* p) {
#if defined(__CUDA_ARCH__)
  return __ldcg(p);
#else
  return *p;
#endif
}

struct Quad {
  float v[4];
};

FG_D Quad read_quad(const float* p) {  // 16-byte aligned
#if defined(__CUDA_ARCH__)
  const float4 q = __ldcg(reinterpret_cast<const float4*>(p));
  return {{q.x, q.y, q.z, q.w}};
#else
  return {{p[0], p[1], p[2], p[3]}};
#endif
}

struct Site {
  int32_t i, j;
};

template <class Team>
struct Context {
  Team& team;
  const Launch& a;
  const Header& h;
  const Buffer* buffers;
  const Tap* entries;
  const int32_t* offsets;
  const Instr* instrs;
  const Micro* code;
  const Stage* stages;
  const float* consts;
  const char* weights;
  int32_t slot0, slots;  // this team's
  int64_t period = 0;

  FG_D Context(Team& t, const Launch& launch) : team(t), a(launch), h(*reinterpret_cast<const Header*>(launch.block)) {
    buffers = table<Buffer>(h.buffers), entries = table<Tap>(h.entries), offsets = table<int32_t>(h.offsets);
    instrs = table<Instr>(h.instrs), code = table<Micro>(h.code), stages = table<Stage>(h.stages);
    consts = table<float>(h.consts), weights = table<char>(h.weights);
    const int64_t n = a.slots;
    slot0 = static_cast<int32_t>(n * t.index() / a.teams);
    slots = static_cast<int32_t>(n * (t.index() + 1) / a.teams) - slot0;
  }

  template <class T>
  FG_D const T* table(int64_t offset) const {
    return reinterpret_cast<const T*>(a.block + offset);
  }

  template <class T>
  FG_D T* shared(int32_t offset) const {
    return reinterpret_cast<T*>(team.shared() + offset);
  }

  // f(i) for i in [0, n), shared by the threads of this CTA; neighbouring threads have neighbouring i.
  template <class F>
  FG_D void for_each(int n, F f) const {
    const int step = team.warps() * kLanes;
    for (int base = team.warp() * kLanes; base < n; base += step)
      for_lanes([&](int lane) {
        if (base + lane < n) f(base + lane);
      });
  }

  // Iteration site of a column's item; false: outside the grid.
  FG_D bool site_of(const Stage& s, const StageItem& item, int32_t m, Site* site) const {
    const int64_t q = item.q0 + static_cast<int64_t>(m) * item.qstep + s.advance * period;
    if (q < 0 || q >= static_cast<int64_t>(s.q_rows) * s.q_cols) return false;
    site->i = static_cast<int32_t>(q) / s.q_cols;
    site->j = static_cast<int32_t>(q) - site->i * s.q_cols;
    return true;
  }

  static FG_D int64_t floor_div(int64_t x, int32_t by) {
    if (by == 1) return x;
    const int64_t q = x / by;
    return q * by > x ? q - 1 : q;
  }

  static FG_D int32_t ring(int64_t x, int32_t size) {
    return static_cast<int32_t>(x < size ? x : static_cast<int32_t>(x) % size);
  }

  // Where a tap of iteration site (i, j) is for a slot (of the whole call), or null when that is out of bounds.
  FG_D float* source(const Tap& t, Site q, int32_t slot) const {
    const int64_t row = floor_div(static_cast<int64_t>(q.i) * t.mul_i + t.off_i, t.div_i);
    const int64_t col = floor_div(static_cast<int64_t>(q.j) * t.mul_j + t.off_j, t.div_j);
    if (row < t.lo_i || row >= t.hi_i || col < t.lo_j || col >= t.hi_j) return nullptr;
    const Buffer& b = buffers[t.buf];
    if (b.kind == kCond || b.kind == kConst) {
      const int64_t at = (row * b.cols + col) * b.channels + t.chan;
      if (b.kind == kConst) return const_cast<float*>(consts + b.offset) + at;
      return const_cast<float*>(a.cond[b.offset]) + slot * (static_cast<int64_t>(b.rows) * b.cols * b.channels) + at;
    }
    const int64_t at = static_cast<int64_t>(ring(row, b.ring_rows)) * b.ring_cols + ring(col, b.ring_cols);
    return a.arena + slot * a.arena_stride + b.offset + at * b.channels + t.chan;
  }

  // Where column `column` of an item has its place `entry`.
  FG_D float* place(const Stage& s, const StageItem& item, int32_t entry, int32_t column) const {
    const Tap& t = entries[s.entry0 + entry];
    const int32_t m = column / slots, slot = slot0 + column - m * slots;
    Site q;
    if (!site_of(s, item, m, &q)) return nullptr;
    const Buffer& b = buffers[t.buf];
    if (b.kind == kTemp)
      return a.arena + slot * a.arena_stride + b.offset + static_cast<int64_t>(m) * b.channels + t.chan;
    return source(t, q, slot);
  }
};

}  // namespace fastgen::team
