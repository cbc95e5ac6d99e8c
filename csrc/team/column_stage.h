// A stage of columns: one warp runs the whole vector program of a column (= site x slot), its scratch in shared memory.
#pragma once
#include "context.h"
#include "maps.h"

namespace fastgen::team {

template <class Team>
class ColumnStage {
 public:
  FG_D ColumnStage(const Context<Team>& context, const Stage& stage, const StageItem& item)
      : x_(context), s_(stage), item_(item) {}

  FG_D void run() {
    const int columns = item_.count * x_.slots;
    const int room = x_.h.work_bytes / (s_.scratch * static_cast<int>(sizeof(float)));
    const int active = room < x_.team.warps() ? room : x_.team.warps();
    if (x_.team.warp() < active) {
      scratch_ = x_.template shared<float>(0) + x_.team.warp() * s_.scratch;
      for (int c = x_.team.rank() * active + x_.team.warp(); c < columns; c += x_.team.size() * active) program(c);
    }
    x_.team.sync_cta();
  }

 private:
  FG_D void program(int column) {
    for (int k = 0; k < s_.ncode; ++k) {
      const Micro& m = behind<Micro>(s_, s_.code)[k];
      switch (m.fn) {
        case kLoad: {
          const float* from = x_.place(s_, item_, behind<Place>(s_, s_.places)[m.a], column);
          each(m.n, [&](int i) { scratch_[m.dst + i] = from == nullptr ? m.imm0 : read_state(from + i); });
          break;
        }
        case kStore: {
          float* to = x_.place(s_, item_, behind<Place>(s_, s_.places)[m.b], column);
          const float* from = operand(m.a);
          if (to != nullptr) each(m.n, [&](int i) { to[m.c + i] = from[i]; });
          break;
        }
        case kSum: reduce(m, [](float a, float b) { return a + b; }, 0.0f); break;
        case kMax: reduce(m, [](float a, float b) { return b != b ? b : maximum(a, b); }, -INFINITY); break;
        case kMin: reduce(m, [](float a, float b) { return b != b ? b : minimum(a, b); }, INFINITY); break;
        default: map(m);
      }
      x_.team.sync_warp();
    }
  }

  FG_D const float* operand(int32_t at) const { return at >= 0 ? scratch_ + at : x_.consts + ~at; }

  template <class F>
  FG_D void each(int n, F f) const {
    for_lanes([&](int lane) {
      for (int i = lane; i < n; i += kLanes) f(i);
    });
  }

  template <class F>
  FG_D void reduce(const Micro& m, F f, float start) {
    const float* from = operand(m.a);
    const float result = combine_lanes(
        [&](int lane) {
          float part = start;
          for (int i = lane; i < m.n; i += kLanes) part = f(part, from[i]);
          return part;
        },
        f);
    each(1, [&](int) { scratch_[m.dst] = result; });
  }

  FG_D void map(const Micro& m) {
    float* to = scratch_ + m.dst;
    const float* a = m.fn == kFill ? nullptr : operand(m.a);
    if (m.fn == kEmbed) {
      const float row = a[0] > 0 ? minimum(a[0], m.imm0 - 1) : 0;  // NaN: row 0
      x_.team.sync_warp();                                         // all have read it, should the result lie over it
      const float* from = x_.consts + m.b + static_cast<int64_t>(row) * m.n;
      return each(m.n, [&](int i) { to[i] = from[i]; });
    }
    if (m.fn == kGather) {
      const float* index = x_.consts + m.b;
      return each(m.n, [&](int i) { to[i] = a[static_cast<int32_t>(index[i])]; });
    }
    if (m.fn == kBroadcast) {
      const float value = a[0];
      return each(m.n, [&](int i) { to[i] = value; });
    }
    const int count = operands_of(m.fn);
    const float* b = count > 1 ? operand(m.b) : nullptr;
    const float* c = count > 2 ? operand(m.c) : nullptr;
    each(m.n, [&](int i) {
      to[i] = map_of(m.fn, count > 0 ? a[i] : 0.0f, b == nullptr ? 0.0f : b[i], c == nullptr ? 0.0f : c[i], &m.imm0);
    });
  }

  const Context<Team>& x_;
  const Stage& s_;
  const StageItem& item_;
  float* scratch_ = nullptr;
};

}  // namespace fastgen::team
