// Programs made by hand or at random, and an interpreter of plan.h in plain loops to hold the executor against.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../heads.h"
#include "../plan.h"
#include "../rng.h"

namespace fastgen::test {

struct Tables {
  std::vector<Buffer> buffers;
  std::vector<Tap> taps;
  std::vector<Micro> code;
  std::vector<Op> ops;
  std::vector<Item> row_items, step_items;
  std::vector<int32_t> row_ptr{0}, step_ptr{0}, step_site, step_phase, param_ptr{0};
  std::vector<float> weights, consts;
  std::vector<uint16_t> half_weights;  // used instead when not empty
  Program p = {};

  Program& program() {
    p.buffers = buffers.data(), p.nbuffers = buffers.size();
    p.taps = taps.data(), p.ntaps = taps.size();
    p.code = code.data(), p.ncode = code.size();
    p.ops = ops.data(), p.nops = ops.size();
    p.row_items = row_items.data(), p.row_ptr = row_ptr.data();
    p.step_items = step_items.data(), p.step_ptr = step_ptr.data();
    p.step_site = step_site.data(), p.step_phase = step_phase.data(), p.param_ptr = param_ptr.data();
    const bool half = !half_weights.empty();
    p.weight_bits = half ? 16 : 32;
    p.weights = half ? static_cast<const void*>(half_weights.data()) : weights.data();
    p.nweights = half ? half_weights.size() : weights.size();
    p.consts = consts.data(), p.nconsts = consts.size();
    return p;
  }

  int32_t constants(int64_t n, const std::function<float()>& value) {
    const int32_t at = consts.size();
    for (int64_t i = 0; i < n; ++i) consts.push_back(value());
    return at;
  }

  // A state (or input) buffer at the end of the arena.
  int32_t state(int32_t channels, int32_t rows, int32_t cols, int32_t ring_rows, int32_t ring_cols,
                int32_t kind = kState) {
    buffers.push_back({channels, rows, cols, ring_rows, ring_cols, kind, p.arena});
    p.arena += int64_t{channels} * ring_rows * ring_cols;
    return buffers.size() - 1;
  }
};

inline int64_t floor_div(int64_t a, int64_t b) { return static_cast<int64_t>(std::floor(static_cast<double>(a) / b)); }

// One sample, one site, one output at a time.
class Naive {
 public:
  Naive(const Program& p, const RunArgs& args) : p_(p), a_(args) {}

  void run() {
    for (slot_ = 0; slot_ < a_.slots; ++slot_) {
      arena_.assign(p_.arena, 0.0f);
      const Head& h = p_.head;
      if (h.start >= 0) std::copy_n(p_.consts + h.start, h.channels * h.enc, at(h.input, 0, 0, 0));
      for (int64_t step = 0; step < p_.steps; ++step) {
        const int32_t slot = step % p_.period;
        const int32_t* row = p_.row_ptr + slot / p_.row_len;
        if (slot % p_.row_len == 0)
          for (int32_t i = row[0]; i < row[1]; ++i) item(p_.row_items[i], step / p_.period);
        for (int32_t i = p_.step_ptr[slot]; i < p_.step_ptr[slot + 1]; ++i) item(p_.step_items[i], step / p_.period);
        draw(step, p_.step_site[slot] + step / p_.period * (p_.period / h.phases), p_.step_phase[slot]);
      }
    }
  }

 private:
  float* at(int32_t buffer, int64_t i, int64_t j, int32_t chan) {
    const Buffer& b = p_.buffers[buffer];
    if (b.kind == kCond || b.kind == kConst) {
      const float* base =
          b.kind == kConst ? p_.consts + b.offset : a_.cond[b.offset] + int64_t{slot_} * b.rows * b.cols * b.channels;
      return const_cast<float*>(base) + (i * b.cols + j) * b.channels + chan;
    }
    return arena_.data() + b.offset + ((i % b.ring_rows) * b.ring_cols + j % b.ring_cols) * b.channels + chan;
  }

  std::vector<float> read(const Tap& t, int64_t i, int64_t j, float outside) {
    const int64_t si = floor_div(i * t.mul_i + t.off_i, t.div_i), sj = floor_div(j * t.mul_j + t.off_j, t.div_j);
    if (si < t.lo_i || si >= t.hi_i || sj < t.lo_j || sj >= t.hi_j) return std::vector<float>(t.nchan, outside);
    const float* from = at(t.buf, si, sj, t.chan);
    return std::vector<float>(from, from + t.nchan);
  }

  float weight(int64_t index) const {
    if (p_.weight_bits == 32) return static_cast<const float*>(p_.weights)[index];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(p_.weights)[index]} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void item(const Item& item, int64_t period) {
    const Op& o = p_.ops[item.op];
    for (int64_t m = 0; m < item.count; ++m) {
      const int64_t q = item.q0 + m * item.qstep + o.advance * period;
      if (q >= 0 && q < int64_t{o.q_rows} * o.q_cols) op(o, q / o.q_cols, q % o.q_cols);
    }
  }

  void op(const Op& o, int64_t i, int64_t j) {
    const int64_t di = i * o.up_i + o.par_i, dj = j * o.up_j + o.par_j;
    std::vector<float> s(o.scratch);
    std::vector<float> x;
    for (int32_t t = 0; t < o.ntaps; ++t) {
      const std::vector<float> part = read(p_.taps[o.tap0 + t], i, j, 0.0f);
      x.insert(x.end(), part.begin(), part.end());
    }
    for (int32_t n = 0; n < o.acc; ++n) {
      s[n] = o.bias < 0 ? 0.0f : p_.consts[o.bias + n];
      if (o.site_bias >= 0) s[n] += *at(o.site_bias, di, dj, n);
      if (o.partial >= 0) s[n] += *at(o.partial, di, dj, n);
      for (int32_t k = 0; k < o.k; ++k)
        s[n] = std::fma(weight(o.weights + (int64_t{n} / kPanel * o.k + k) * kPanel + n % kPanel), x[k], s[n]);
    }
    for (int32_t m = 0; m < o.ncode; ++m) micro(p_.code[o.code0 + m], s, i, j, di, dj);
  }

  void micro(const Micro& m, std::vector<float>& s, int64_t i, int64_t j, int64_t di, int64_t dj) {
    const auto value = [&](int32_t x, int32_t k) { return x >= 0 ? s[x + k] : p_.consts[~x + k]; };
    if (m.fn == kLoad) {
      const std::vector<float> from = read(p_.taps[m.a], i, j, m.imm0);
      std::copy(from.begin(), from.end(), s.begin() + m.dst);
    } else if (m.fn == kStore) {
      for (int32_t k = 0; k < m.n; ++k) *at(m.b, di, dj, m.c + k) = value(m.a, k);
    } else if (m.fn == kSum) {
      float sum = 0;
      for (int32_t k = 0; k < m.n; ++k) sum += value(m.a, k);
      s[m.dst] = sum;
    } else if (m.fn == kMax) {
      float best = value(m.a, 0);
      for (int32_t k = 1; k < m.n; ++k) best = std::max(best, value(m.a, k));
      s[m.dst] = best;
    } else {
      std::vector<float> result(m.n);
      for (int32_t k = 0; k < m.n; ++k) result[k] = one(m, k, value, s);
      std::copy(result.begin(), result.end(), s.begin() + m.dst);
    }
  }

  template <class Value>
  float one(const Micro& m, int32_t k, const Value& value, const std::vector<float>& s) {
    const float a = m.fn == kFill ? 0.0f : value(m.a, m.fn == kEmbed || m.fn == kGather || m.fn == kBroadcast ? 0 : k);
    const auto b = [&] { return value(m.b, k); };
    switch (m.fn) {
      case kEmbed: return p_.consts[m.b + static_cast<int>(std::clamp(a, 0.0f, m.imm0 - 1)) * m.n + k];
      case kGather: return s[m.a + static_cast<int>(p_.consts[m.b + k])];
      case kCopy:
      case kBroadcast: return a;
      case kFill: return m.imm0;
      case kRelu: return std::max(a, 0.0f);
      case kAbs: return std::fabs(a);
      case kAffine: return std::fma(a, m.imm0, m.imm1);
      case kClamp: return std::clamp(a, m.imm0, m.imm1);
      case kAdd: return a + b();
      case kSub: return a - b();
      case kMul: return a * b();
      case kMaximum: return std::max(a, b());
      case kGt: return a > b();
      case kMulAdd: return std::fma(a, b(), value(m.c, k));
      case kWhere: return a != 0 ? b() : value(m.c, k);
      default: std::abort();
    }
  }

  void draw(int64_t step, int64_t site, int32_t phase) {
    const Head& h = p_.head;
    std::vector<float> params, values(h.channels);
    std::vector<double> u(head_uniforms(h));
    for (int32_t t = p_.param_ptr[phase]; t < p_.param_ptr[phase + 1]; ++t) {
      const std::vector<float> part = read(p_.taps[t], site / p_.cols, site % p_.cols, 0.0f);
      params.insert(params.end(), part.begin(), part.end());
    }
    if (a_.params) std::copy(params.begin(), params.end(), a_.params + (slot_ * p_.steps + step) * h.params);
    for (size_t k = 0; k < u.size(); ++k) u[k] = uniform(a_.seed, a_.first + slot_, step, k);
    const int64_t first = (int64_t{slot_} * p_.rows * p_.cols + site) * h.channels + phase;
    std::vector<float> known(h.channels, std::nanf(""));
    for (int32_t c = 0; c < (h.phases == 1 ? h.channels : 1); ++c)
      if (a_.mask && a_.mask[first + c]) known[c] = a_.given[first + c];
    head_draw(h, params.data(), u.data(), a_.temperature, values.data(), known.data());
    for (int32_t c = 0; c < (h.phases == 1 ? h.channels : 1); ++c) {
      const int32_t channel = phase + c;
      const int64_t index = first + c;
      const float value = a_.mask && a_.mask[index] ? a_.given[index] : values[c];
      a_.out[index] = value;
      const int64_t next = site + h.delay;
      if (next >= int64_t{p_.rows} * p_.cols) continue;
      float* input = at(h.input, next / p_.cols, next % p_.cols, channel * h.enc);
      if (h.table < 0)
        *input = value;
      else
        std::copy_n(p_.consts + h.table + static_cast<int>(value) * h.enc, h.enc, input);
    }
  }

  const Program& p_;
  const RunArgs& a_;
  int32_t slot_ = 0;
  std::vector<float> arena_;
};

}  // namespace fastgen::test
