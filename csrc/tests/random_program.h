// Random programs: they compute nothing sensible, but use every addressing mode, item form and head.
#pragma once
#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#include "naive.h"

namespace fastgen::test {

class RandomProgram : public Tables {
 public:
  explicit RandomProgram(uint32_t seed, bool large = false) : random_(seed), large_(large) {
    const int32_t channels = one_of({1, 1, 3});
    sequence_ = !large && chance(3);
    p.rows = sequence_ ? 1 : between(2, 6);
    p.cols = sequence_ ? between(20, 40) : large ? 24 : between(2, 7);
    p.head.channels = channels;
    p.head.phases = channels;
    p.head.kind = channels == 1 ? one_of({kCategorical, kBernoulli, kGaussianMixture}) : kCategorical;
    if (channels == 3 && chance(2)) p.head.kind = kLogisticMixture, p.head.phases = 1;
    p.steps = int64_t{p.rows} * p.cols * p.head.phases;
    p.row_len = (sequence_ ? 4 : p.cols) * p.head.phases;
    p.period = sequence_ ? p.row_len * between(1, 2) : p.steps;
    fill_head();
    cond_ = buffers.size();
    buffers.push_back({3, p.rows, p.cols, 1, 1, kCond, 0});
    const int32_t n = between(2, 5);
    for (int32_t i = 0; i < n; ++i) add_op(i == n - 1);
    schedule();
  }

  int64_t cond_floats() const { return int64_t{3} * p.rows * p.cols; }

 private:
  int32_t between(int32_t lo, int32_t hi) { return std::uniform_int_distribution<int32_t>(lo, hi)(random_); }
  bool chance(int32_t n) { return between(1, n) == 1; }
  int32_t one_of(std::vector<int32_t> v) { return v[between(0, v.size() - 1)]; }
  float real() { return std::uniform_real_distribution<float>(-1, 1)(random_); }
  std::function<float()> reals() {
    return [this] { return real(); };
  }

  void fill_head() {
    Head& h = p.head;
    h.n = h.kind == kBernoulli ? 1 : between(2, 7);
    h.params = h.kind == kCategorical       ? h.n
               : h.kind == kBernoulli       ? 1
               : h.kind == kGaussianMixture ? 3 * h.n
                                            : 10 * h.n;
    h.levels = h.kind == kLogisticMixture ? 256 : 0;
    h.floor_log_scale = -3, h.clip_lo = -2, h.clip_hi = 2;
    const bool table = h.kind == kCategorical && chance(2);
    h.enc = table ? between(1, 4) : 1;
    h.table = table ? constants(int64_t{h.n} * h.enc, reals()) : -1;
    h.delay = between(0, 1);
    h.start = chance(2) ? constants(h.channels * h.enc, reals()) : -1;
    const int32_t rows = p.rows, cols = p.cols;
    h.input = state(h.channels * h.enc + between(0, 2), rows, cols, sequence_ ? 1 : rows, sequence_ ? 8 : cols, kInput);
    params_ = state(h.params * h.phases, rows, cols, sequence_ ? 1 : 2, cols);
    param_ptr = {int32_t(taps.size())};
    for (int32_t f = 0; f < h.phases; ++f) {  // in two pieces where possible
      const int32_t cut = between(0, h.params - 1);
      if (cut > 0) taps.push_back({params_, f * h.params, cut, 1, 1, 1, 1, 0, 0, 0, rows, 0, cols});
      taps.push_back({params_, f * h.params + cut, h.params - cut, 1, 1, 1, 1, 0, 0, 0, rows, 0, cols});
      param_ptr.push_back(taps.size());
    }
  }

  Tap random_tap(int32_t buffer) {
    const Buffer& b = buffers[buffer];
    Tap t = {buffer, 0, 0, 1, 1, 1, 1, between(-2, 1), between(-3, 1), 0, b.rows, 0, b.cols};
    t.nchan = between(1, b.channels), t.chan = between(0, b.channels - t.nchan);
    if (chance(4)) t.mul_j = 2;
    if (chance(4)) t.div_j = 2;
    if (chance(5)) t.mul_i = 2, t.div_i = 3;
    if (chance(5)) t.lo_j = between(0, b.cols), t.hi_j = between(0, b.cols);
    return t;
  }

  int32_t readable() {  // any buffer so far: the op's own output is made afterwards
    const int32_t b = between(0, buffers.size() - 1);
    return b == params_ ? p.head.input : b;
  }

  void add_op(bool last) {
    Op o = {};
    o.q_rows = p.rows, o.q_cols = p.cols, o.up_i = o.up_j = 1;
    if (!last && !sequence_ && chance(4)) o.q_cols = (p.cols + 1) / 2, o.up_j = 2, o.par_j = 0;
    o.bias = o.site_bias = o.partial = -1;
    const int32_t width = last ? p.head.params * p.head.phases : large_ ? between(100, 330) : between(1, 70);
    const bool linear = last || !chance(5);
    o.tap0 = taps.size();
    if (linear) {
      o.acc = width;
      o.ntaps = large_ ? between(4, 9) : between(chance(4) ? 0 : 1, 5);
      for (int32_t t = 0; t < o.ntaps; ++t) taps.push_back(random_tap(readable())), o.k += taps.back().nchan;
      const int32_t padded = (width + kPanel - 1) / kPanel * kPanel;
      o.weights = weights.size();
      for (int64_t i = 0; i < int64_t{padded} * o.k; ++i) weights.push_back(real() / std::sqrt(float(o.k)));
      if (chance(2)) o.bias = constants(padded, reals());
      if (chance(3)) o.site_bias = const_buffer(width);
      if (chance(3)) o.partial = const_buffer(width);
    }
    add_code(o, width, last ? params_ : -1);
    ops.push_back(o);
  }

  int32_t const_buffer(int32_t channels) {
    buffers.push_back(
        {channels, p.rows, p.cols, 1, 1, kConst, constants(int64_t{channels} * p.rows * p.cols, reals())});
    return buffers.size() - 1;
  }

  // Loads, a few maps, stores. Positions: linear part, then t, u, v of `width` floats, then two single ones.
  void add_code(Op& o, int32_t n, int32_t target) {
    const int32_t t = (o.acc + kPanel - 1) / kPanel * kPanel, u = t + n, v = u + n, one = v + n;
    const int32_t a = o.acc > 0 ? 0 : u, k = constants(n, reals());
    o.code0 = code.size();
    o.scratch = one + 2;
    const int32_t from = readable();
    if (buffers[from].channels >= n) {
      Tap tap = random_tap(from);
      tap.nchan = n, tap.chan = between(0, buffers[from].channels - n);
      taps.push_back(tap);
      code.push_back({kLoad, u, int32_t(taps.size()) - 1, 0, 0, n, 0.25f, 0, 0});
    } else {
      code.push_back({kFill, u, 0, 0, 0, n, 0.5f, 0, 0});
    }
    const int32_t table = constants(3 * n, reals());
    const int32_t order = constants(n, [this, n] { return float(between(0, n - 1)); });
    code.push_back({kMulAdd, t, a, ~k, u, n, 0, 0, 0});
    code.push_back({kAffine, t, t, 0, 0, n, 0.7f, 0.1f, 0});
    code.push_back({kSum, one, t, 0, 0, n, 0, 0, 0});
    code.push_back({kMax, one + 1, t, 0, 0, n, 0, 0, 0});
    code.push_back({kEmbed, v, one, table, 0, n, 3, 0, 0});
    code.push_back({kGt, u, u, v, 0, n, 0, 0, 0});
    code.push_back({kWhere, v, u, v, t, n, 0, 0, 0});
    code.push_back({kGather, u, v, order, 0, n, 0, 0, 0});
    code.push_back({kBroadcast, v, one + 1, 0, 0, n, 0, 0, 0});
    code.push_back({chance(2) ? kSub : kMaximum, v, u, v, 0, n, 0, 0, 0});
    code.push_back({kMul, v, v, ~k, 0, n, 0, 0, 0});
    code.push_back({kAdd, v, v, t, 0, n, 0, 0, 0});
    code.push_back({chance(2) ? kRelu : kAbs, u, v, 0, 0, n, 0, 0, 0});
    code.push_back({kClamp, v, v, 0, 0, n, -2, 2, 0});
    code.push_back({kClamp, u, u, 0, 0, n, -2, 2, 0});
    code.push_back({kCopy, t, v, 0, 0, n, 0, 0, 0});
    const int32_t ring = sequence_ ? one_of({8, 16}) : p.cols;
    if (target < 0) target = state(2 * n, p.rows, p.cols, sequence_ ? 1 : between(2, p.rows), ring);
    code.push_back({kStore, 0, t, target, 0, n, 0, 0, 0});
    if (buffers[target].channels == 2 * n) code.push_back({kStore, 0, u, target, n, n, 0, 0, 0});
    o.ncode = code.size() - o.code0;
  }

  void schedule() {
    const int32_t phases = p.head.phases;
    if (sequence_)
      for (Op& o : ops) o.advance = p.period / phases;
    std::vector<bool> per_row;
    for (size_t i = 0; i < ops.size(); ++i) per_row.push_back(i + 1 < ops.size() && chance(2));
    const int32_t row_sites = p.row_len / phases;
    for (int32_t r = 0; r < p.period / p.row_len; ++r) {
      for (size_t i = 0; i < ops.size(); ++i) {
        const Op& o = ops[i];
        const int32_t first = sequence_ ? r * row_sites - between(0, 2) : r * o.q_cols;
        if (per_row[i]) row_items.push_back({int32_t(i), first, sequence_ ? row_sites : o.q_cols, 1});
      }
      row_ptr.push_back(row_items.size());
    }
    std::vector<int32_t> order(p.period);  // of the draws; of an image any
    for (int32_t s = 0; s < p.period; ++s) order[s] = s;
    if (!sequence_ && chance(2)) std::shuffle(order.begin(), order.end(), random_);
    for (int32_t s = 0; s < p.period; ++s) {
      const int32_t site = s / phases;
      step_site.push_back(order[s] / phases), step_phase.push_back(order[s] % phases);
      for (size_t i = 0; i < ops.size(); ++i) {
        const Op& o = ops[i];
        if (per_row[i] || (site % p.cols) % o.up_j != 0) continue;
        const int32_t q = site / p.cols * o.q_cols + site % p.cols / o.up_j;
        step_items.push_back({int32_t(i), q, between(1, 2), 1});
      }
      step_ptr.push_back(step_items.size());
    }
  }

  std::mt19937 random_;
  const bool large_;
  bool sequence_ = false;
  int32_t params_ = -1, cond_ = -1;
};

}  // namespace fastgen::test
