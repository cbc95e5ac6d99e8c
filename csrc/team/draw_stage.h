// The draw: a warp takes a slot. The choice among many logits is shared by its lanes; what follows is a few numbers.
#pragma once
#include "../heads.h"
#include "context.h"

namespace fastgen::team {

template <class Team>
class DrawStage {
 public:
  FG_D DrawStage(const Context<Team>& context, const Stage& stage) : x_(context), s_(stage), h_(context.h.head) {}

  FG_D void run(int64_t step, int32_t site) {
    const int room = x_.h.work_bytes / (x_.h.draw_floats * static_cast<int>(sizeof(float)));
    const int active = room < x_.team.warps() ? room : x_.team.warps();
    if (x_.team.warp() < active) {
      params_ = x_.template shared<float>(0) + x_.team.warp() * x_.h.draw_floats;
      sums_ = reinterpret_cast<double*>(params_ + x_.h.draw_floats - kDrawScratch);
      uniforms_ = sums_ + kLanes;
      values_ = reinterpret_cast<float*>(uniforms_ + 4);
      for (int s = x_.team.rank() * active + x_.team.warp(); s < x_.slots; s += x_.team.size() * active)
        draw(step, site, x_.slot0 + s);
    }
    x_.team.sync_cta();
  }

 private:
  FG_D void draw(int64_t step, int32_t site, int32_t slot) {
    gather(step, site, slot);
    const uint64_t sample = x_.a.first + static_cast<uint64_t>(slot);
    for_lanes([&](int lane) {
      if (lane == 0) uniform_block(x_.a.seed, sample, static_cast<uint32_t>(step), 0, uniforms_);
    });
    x_.team.sync_warp();
    const int32_t logits = head_logits(h_);
    const int32_t choice = logits > 0 ? pick(logits, uniforms_[0]) : 0;
    const int32_t first = h_.phases == 1 ? 0 : s_.phase, count = h_.phases == 1 ? h_.channels : 1;
    const int64_t at = (static_cast<int64_t>(slot) * x_.h.rows * x_.h.cols + site) * h_.channels + first;
    for_lanes([&](int lane) {
      if (lane == 0) decide(at, count, choice);
    });
    x_.team.sync_warp();
    for (int32_t c = 0; c < count; ++c) feed(site, slot, first + c, values_[c]);
    x_.team.sync_warp();
  }

  // Value, known or drawn, to `values_` and `out`.
  FG_D void decide(int64_t at, int32_t count, int32_t choice) const {
    float* known = nullptr;
    if (x_.a.mask != nullptr) {
      known = values_ + count;
      for (int32_t c = 0; c < count; ++c) known[c] = x_.a.mask[at + c] ? x_.a.given[at + c] : NAN;
    }
    head_value(h_, params_, choice, uniforms_, x_.a.temperature, values_, known);
    for (int32_t c = 0; c < count; ++c) {
      if (x_.a.mask != nullptr && x_.a.mask[at + c]) values_[c] = x_.a.given[at + c];  // also where it is NaN
      x_.a.out[at + c] = values_[c];
    }
  }

  FG_D void gather(int64_t step, int32_t site, int32_t slot) const {
    const Place* places = behind<Place>(s_, s_.places);
    const Site q = {site / x_.h.cols, site % x_.h.cols};
    float* keep = x_.a.params == nullptr ? nullptr : x_.a.params + (slot * x_.h.steps + step) * h_.params;
    int32_t filled = 0;
    for (int32_t t = 0; t < s_.nplaces; ++t) {
      const float* from = x_.source(places[t], q, slot);
      for_lanes([&](int lane) {
        for (int32_t i = lane; i < places[t].nchan; i += kLanes) {
          const float value = from == nullptr ? 0.0f : read_state(from + i);
          params_[filled + i] = value;
          if (keep != nullptr) keep[filled + i] = value;
        }
      });
      filled += places[t].nchan;
    }
    x_.team.sync_warp();
  }

  // As pick() of heads.h: each lane sums a stretch of the classes, then all find the stretch and walk it.
  FG_D int32_t pick(int32_t n, double u) const {
    const float* logits = params_;
    const double temperature = x_.a.temperature;
    const float most = combine_lanes(
        [&](int lane) {
          float best = logits[0];
          for (int32_t k = lane; k < n; k += kLanes) best = logits[k] > best ? logits[k] : best;
          return best;
        },
        [](float a, float b) { return a > b ? a : b; });
    const int32_t stride = (n + kLanes - 1) / kLanes;
    for_lanes([&](int lane) {
      double sum = 0;
      for (int32_t k = lane * stride; k < n && k < (lane + 1) * stride; ++k)
        sum += exp((static_cast<double>(logits[k]) - most) / temperature);
      sums_[lane] = sum;
    });
    x_.team.sync_warp();
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += sums_[i];
    if (!(total > 0)) return -1;
    const double target = u * total;
    double sum = 0;
    int32_t k = 0;
    for (int i = 0; i < kLanes && (i + 1) * stride < n && sum + sums_[i] <= target; ++i)
      sum += sums_[i], k = (i + 1) * stride;
    for (; k < n - 1; ++k) {
      sum += exp((static_cast<double>(logits[k]) - most) / temperature);
      if (sum > target) break;
    }
    return k;
  }

  // Writes what forward's input holds for a value.
  FG_D void feed(int32_t site, int32_t slot, int32_t channel, float value) const {
    const int64_t target = static_cast<int64_t>(site) + h_.delay;
    if (target >= static_cast<int64_t>(x_.h.rows) * x_.h.cols) return;
    const Site q = {static_cast<int32_t>(target / x_.h.cols), static_cast<int32_t>(target % x_.h.cols)};
    float* to = x_.source(x_.h.input, q, slot);
    if (to == nullptr) return;
    to += channel * h_.enc;
    const float last = static_cast<float>(h_.kind == kBernoulli ? 1 : h_.n - 1);
    const float row = value > 0 ? (value < last ? value : last) : 0;  // NaN: row 0
    const float* from = h_.table < 0 ? nullptr : x_.consts + h_.table + static_cast<int64_t>(row) * h_.enc;
    for_lanes([&](int lane) {
      for (int32_t e = lane; e < h_.enc; e += kLanes) to[e] = from == nullptr ? value : from[e];
    });
  }

  const Context<Team>& x_;
  const Stage& s_;
  const Head& h_;
  float* params_ = nullptr;     // of the step
  double* sums_ = nullptr;      // [32]
  double* uniforms_ = nullptr;  // [4]
  float* values_ = nullptr;     // [channels], then the known ones
};

}  // namespace fastgen::team
