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

FG_D void copy_16(char* to, const char* from) {
#if defined(__CUDA_ARCH__)
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(at), "l"(from) : "memory");
#else
  std::memcpy(to, from, 16);
#endif
}

FG_D void wait_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

struct Site {
  int32_t i, j;
};

template <class Team>
struct Context {
  Team& team;
  const Launch& a;
  const Header& h;  // in shared memory
  const float* consts;
  const char* weights;
  int32_t work_at;       // of shared memory
  int32_t slot0, slots;  // this team's
  int64_t period = 0;

  FG_D Context(Team& t, const Launch& launch) : team(t), a(launch), h(*reinterpret_cast<const Header*>(t.shared())) {
    const Header& there = *reinterpret_cast<const Header*>(a.block);
    consts = reinterpret_cast<const float*>(a.block + there.consts), weights = a.block + there.weights;
    work_at = there.work_at;
    const int64_t n = a.slots;
    slot0 = static_cast<int32_t>(n * t.index() / a.teams);
    slots = static_cast<int32_t>(n * (t.index() + 1) / a.teams) - slot0;
  }

  // Shared memory that stages use.
  template <class T>
  FG_D T* shared(int32_t offset) const {
    return reinterpret_cast<T*>(team.shared() + work_at + offset);
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

  // The same, from the last warp on: for work beside another that the first warps begin with.
  template <class F>
  FG_D void for_each_from_last(int n, F f) const {
    const int step = team.warps() * kLanes;
    for (int base = (team.warps() - 1 - team.warp()) * kLanes; base < n; base += step)
      for_lanes([&](int lane) {
        if (base + lane < n) f(base + lane);
      });
  }

  // Copies to shared memory, there after the next wait_copies() and sync_cta(). Both aligned to 16 bytes.
  FG_D void copy(char* to, const char* from, int bytes) const {
    for_each(bytes / 16, [&](int i) { copy_16(to + 16 * i, from + 16 * i); });
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

  // Where a place of iteration site (i, j) is for a slot (of the whole call), or null when that is out of bounds.
  FG_D float* source(const Place& p, Site q, int32_t slot) const {
    const int64_t row = floor_div(static_cast<int64_t>(q.i) * p.mul_i + p.off_i, p.div_i);
    const int64_t col = floor_div(static_cast<int64_t>(q.j) * p.mul_j + p.off_j, p.div_j);
    if (row < p.lo_i || row >= p.hi_i || col < p.lo_j || col >= p.hi_j) return nullptr;
    const int64_t site = static_cast<int64_t>(ring(row, p.ring_rows)) * p.ring_cols + ring(col, p.ring_cols);
    const int64_t at = p.offset + site * p.channels + p.chan;
    if (p.kind == kConst) return const_cast<float*>(consts) + at;
    if (p.kind != kCond) return a.arena + slot * a.arena_stride + at;
    return const_cast<float*>(a.cond[p.cond]) + slot * (static_cast<int64_t>(p.ring_rows) * p.ring_cols * p.channels) +
           at;
  }

  // Where column `column` of an item has a place.
  FG_D float* place(const Stage& s, const StageItem& item, const Place& p, int32_t column) const {
    const int32_t m = column / slots, slot = slot0 + column - m * slots;
    Site q;
    if (!site_of(s, item, m, &q)) return nullptr;
    if (p.kind == kTemp)
      return a.arena + slot * a.arena_stride + p.offset + static_cast<int64_t>(m) * p.channels + p.chan;
    return source(p, q, slot);
  }
};

// What follows a stage in its descriptor.
template <class T>
FG_D const T* behind(const Stage& s, int32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(&s) + offset);
}

}  // namespace fastgen::team
