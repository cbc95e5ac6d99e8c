#include "validate.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "functions.h"

namespace fastgen {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// [start, start + count) lies in [0, size), without overflow for any start and count.
bool inside(int64_t start, int64_t count, int64_t size) {
  return start >= 0 && count >= 0 && count <= size && start <= size - count;
}

int64_t round_up(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

void check_sizes(const Program& p) {
  if (p.rows < 1 || p.cols < 1) fail("program: rows x cols is ", p.rows, " x ", p.cols, ", expected at least 1 x 1");
  const int64_t sites = static_cast<int64_t>(p.rows) * p.cols;
  if (sites > INT32_MAX) fail("program: ", sites, " sites, expected fewer than 2^31");
  if (p.head.phases < 1 || p.head.phases > (1 << 24)) fail("head: phases is ", p.head.phases, ", expected 1 to 2^24");
  if (p.steps < 1 || p.steps > sites * p.head.phases)
    fail("program: steps is ", p.steps, ", expected 1 to sites x phases = ", sites * p.head.phases);
  if (p.period < 1 || p.row_len < 1 || p.period % p.row_len != 0)
    fail("program: row_len ", p.row_len, " does not divide period ", p.period);
  if (p.weight_bits != 32 && p.weight_bits != 16)
    fail("program: weight_bits is ", p.weight_bits, ", expected 32 or 16");
  if (p.arena < 0 || p.arena > (int64_t{1} << 40)) fail("program: arena is ", p.arena, " floats, expected 0 to 2^40");
  std::vector<int64_t> drawn;
  for (int32_t t = 0; t < p.period; ++t) {
    if (!inside(p.step_site[t], 1, sites)) fail("step_site ", t, ": site ", p.step_site[t], " of ", sites);
    if (!inside(p.step_phase[t], 1, p.head.phases))
      fail("step_phase ", t, ": phase ", p.step_phase[t], " of ", p.head.phases);
    const int64_t last = t + (p.steps - 1 - t) / p.period * p.period;  // of the steps that this entry serves
    if (t >= p.steps) continue;                                        // a short sequence ends before this entry
    if (site_of_step(p, last) >= sites)
      fail("step_site ", t, ": step ", last, " is at site ", site_of_step(p, last), " of ", sites);
    drawn.push_back(static_cast<int64_t>(p.step_site[t]) * p.head.phases + p.step_phase[t]);
  }
  std::sort(drawn.begin(), drawn.end());
  const auto twice = std::adjacent_find(drawn.begin(), drawn.end());
  if (twice != drawn.end())
    fail("step_site, step_phase: phase ", *twice % p.head.phases, " of site ", *twice / p.head.phases,
         " is drawn twice");
}

void check_buffer(const Program& p, int32_t index) {
  const Buffer& b = p.buffers[index];
  if (b.channels < 1 || b.rows < 1 || b.cols < 1) fail("buffer ", index, ": a size is below 1");
  const double whole = static_cast<double>(b.rows) * b.cols * b.channels;
  const double ring = static_cast<double>(b.ring_rows) * b.ring_cols * b.channels;
  const double limit = static_cast<double>(int64_t{1} << 52);
  if (whole > limit || ring > limit) fail("buffer ", index, ": too large");
  switch (b.kind) {
    case kState:
    case kInput:
      if (b.ring_rows < 1 || b.ring_cols < 1) fail("buffer ", index, ": a ring size is below 1");
      if (!inside(b.offset, static_cast<int64_t>(ring), p.arena))
        fail("buffer ", index, ": floats [", b.offset, ", +", static_cast<int64_t>(ring), ") leave the arena of ",
             p.arena);
      return;
    case kCond:
      if (b.offset < 0 || b.offset > 4096) fail("buffer ", index, ": cond index ", b.offset, ", expected 0 to 4096");
      return;
    case kConst:
      if (!inside(b.offset, static_cast<int64_t>(whole), p.nconsts))
        fail("buffer ", index, ": floats [", b.offset, ", +", static_cast<int64_t>(whole), ") leave the ", p.nconsts,
             " consts");
      return;
    default: fail("buffer ", index, ": kind is ", b.kind, ", expected 0 to 3");
  }
}

void check_tap(const Program& p, int32_t index) {
  const Tap& t = p.taps[index];
  if (!inside(t.buf, 1, p.nbuffers)) fail("tap ", index, ": buffer ", t.buf, " of ", p.nbuffers);
  const Buffer& b = p.buffers[t.buf];
  if (t.nchan < 1 || !inside(t.chan, t.nchan, b.channels))
    fail("tap ", index, ": channels [", t.chan, ", +", t.nchan, ") of ", b.channels);
  if (t.div_i < 1 || t.div_j < 1) fail("tap ", index, ": a divisor is below 1");
  if (t.lo_i < 0 || t.hi_i > b.rows || t.lo_j < 0 || t.hi_j > b.cols)
    fail("tap ", index, ": bounds [", t.lo_i, ", ", t.hi_i, ") x [", t.lo_j, ", ", t.hi_j, ") leave the buffer of ",
         b.rows, " x ", b.cols);
}

// Buffer `index` is addressed at every dst site of the op.
void check_dst(const Program& p, int32_t op, const char* what, int32_t index) {
  const Op& o = p.ops[op];
  if (!inside(index, 1, p.nbuffers)) fail("op ", op, ": ", what, " buffer ", index, " of ", p.nbuffers);
  const Buffer& b = p.buffers[index];
  const int64_t i = static_cast<int64_t>(o.q_rows - 1) * o.up_i + o.par_i;
  const int64_t j = static_cast<int64_t>(o.q_cols - 1) * o.up_j + o.par_j;
  if (i >= b.rows || j >= b.cols)
    fail("op ", op, ": its last site (", i, ", ", j, ") is outside the ", what, " buffer ", index, " of ", b.rows,
         " x ", b.cols);
}

// Replays an op's vector program on a map of which scratch floats hold something.
class ScratchCheck {
 public:
  ScratchCheck(const Program& p, int32_t op) : p_(p), op_(op), written_(p.ops[op].scratch, 0) {
    std::fill_n(written_.begin(), round_up(p.ops[op].acc), 1);
  }

  void check(int32_t index) {
    index_ = index;
    const Micro& m = p_.code[index];
    if (m.n < 1) bad("n is ", m.n, ", expected at least 1");
    const FunctionKind kind = function_kind(m.fn);
    if (kind == FunctionKind::None) bad("unknown function");
    if (kind == FunctionKind::Move) {
      movement(m);
      return;
    }
    const int operands = arity(m.fn);
    const int32_t out = kind == FunctionKind::Reduce ? 1 : m.n;
    read(m, "a", m.a, m.n, out);
    if (operands > 1) read(m, "b", m.b, m.n, out);
    if (operands > 2) read(m, "c", m.c, m.n, out);
    write(m.dst, out);
  }

 private:
  template <class... Parts>
  [[noreturn]] void bad(const Parts&... parts) {
    fail("micro ", index_, " (of op ", op_, ", fn ", p_.code[index_].fn, "): ", parts...);
  }

  void movement(const Micro& m) {
    switch (m.fn) {
      case kLoad:
        if (!inside(m.a, 1, p_.ntaps)) bad("tap ", m.a, " of ", p_.ntaps);
        if (p_.taps[m.a].nchan != m.n) bad("n is ", m.n, ", but tap ", m.a, " has ", p_.taps[m.a].nchan, " channels");
        break;
      case kStore: {
        check_dst(p_, op_, "stored", m.b);
        const Buffer& b = p_.buffers[m.b];
        if (b.kind != kState && b.kind != kInput) bad("buffer ", m.b, " is read only");
        if (!inside(m.c, m.n, b.channels)) bad("channels [", m.c, ", +", m.n, ") of ", b.channels, " in buffer ", m.b);
        read(m, "a", m.a, m.n, 0);
        return;
      }
      case kEmbed: {
        read(m, "a", m.a, 1, 0);
        if (!(m.imm0 >= 1 && m.imm0 <= (1 << 24))) bad("imm0 (rows) is ", m.imm0, ", expected 1 to 2^24");
        if (!inside(m.b, static_cast<int64_t>(m.imm0) * m.n, p_.nconsts))
          bad("its table leaves the ", p_.nconsts, " consts");
        break;
      }
      case kGather:
        if (!inside(m.b, m.n, p_.nconsts)) bad("its indices leave the ", p_.nconsts, " consts");
        for (int32_t k = 0; k < m.n; ++k) {
          const float index = p_.consts[m.b + k];
          if (!(index >= 0 && index < (1 << 24))) bad("index ", k, " is ", index);
          const int64_t from = (m.a < 0 ? ~m.a : m.a) + static_cast<int64_t>(index);
          if (m.a < 0 ? from >= p_.nconsts : from >= static_cast<int64_t>(written_.size()) || !written_[from])
            bad("index ", k, " reads float ", from, ", which holds nothing");
        }
        if (m.a >= 0 && m.dst <= m.a && m.a < m.dst + m.n) bad("dst overlaps a");
        break;
      case kCopy: read(m, "a", m.a, m.n, m.n); break;
      case kFill: break;
      case kBroadcast: read(m, "a", m.a, 1, 0); break;
      default: bad("unknown function");
    }
    write(m.dst, m.n);
  }

  void read(const Micro& m, const char* name, int32_t at, int32_t n, int32_t out) {
    if (at < 0) {
      if (!inside(~at, n, p_.nconsts)) bad(name, " = consts [", ~at, ", +", n, ") of ", p_.nconsts);
      return;
    }
    if (!inside(at, n, written_.size())) bad(name, " = scratch [", at, ", +", n, ") of ", written_.size());
    for (int32_t k = 0; k < n; ++k)
      if (!written_[at + k]) bad(name, " = scratch [", at, ", +", n, "): float ", at + k, " was never written");
    if (out > 0 && m.dst != at && static_cast<int64_t>(m.dst) < int64_t{at} + n &&
        at < static_cast<int64_t>(m.dst) + out)
      bad("dst ", m.dst, " partly overlaps ", name, " ", at);
  }

  void write(int32_t dst, int32_t n) {
    if (!inside(dst, n, written_.size())) bad("dst = scratch [", dst, ", +", n, ") of ", written_.size());
    std::fill_n(written_.begin() + dst, n, 1);
  }

  const Program& p_;
  const int32_t op_;
  int32_t index_ = 0;
  std::vector<char> written_;
};

void check_op(const Program& p, int32_t index) {
  const Op& o = p.ops[index];
  if (o.q_rows < 0 || o.q_cols < 0 || static_cast<int64_t>(o.q_rows) * o.q_cols > INT32_MAX)
    fail("op ", index, ": iteration grid ", o.q_rows, " x ", o.q_cols);
  if (o.up_i < 0 || o.up_j < 0 || o.par_i < 0 || o.par_j < 0 || o.advance < 0)
    fail("op ", index, ": up, par or advance is negative");
  if ((o.q_rows > 1 && o.up_i < 1) || (o.q_cols > 1 && o.up_j < 1))
    fail("op ", index, ": two iteration sites share a dst site (up is 0)");
  if (o.acc < 0 || o.acc > (1 << 26)) fail("op ", index, ": acc is ", o.acc);
  if (!inside(o.tap0, o.ntaps, p.ntaps)) fail("op ", index, ": taps [", o.tap0, ", +", o.ntaps, ") of ", p.ntaps);
  if (!inside(o.code0, o.ncode, p.ncode)) fail("op ", index, ": code [", o.code0, ", +", o.ncode, ") of ", p.ncode);
  if (o.scratch < round_up(o.acc) || o.scratch > (1 << 26))
    fail("op ", index, ": scratch is ", o.scratch, ", expected ", round_up(o.acc), " to 2^26");
  int64_t k = 0;
  for (int32_t t = 0; t < o.ntaps; ++t) k += p.taps[o.tap0 + t].nchan;
  if (k != o.k) fail("op ", index, ": k is ", o.k, ", but its taps have ", k, " channels");
  if (o.acc == 0 && (o.ntaps > 0 || o.bias != -1 || o.site_bias != -1 || o.partial != -1))
    fail("op ", index, ": taps, bias, site_bias or partial without output channels (acc = 0)");
  if (o.k > 0 && (k > INT32_MAX / 64 || !inside(o.weights, round_up(o.acc) * k, p.nweights)))
    fail("op ", index, ": weights [", o.weights, ", +", round_up(o.acc) * k, ") of ", p.nweights);
  if (o.bias != -1 && !inside(o.bias, round_up(o.acc), p.nconsts))
    fail("op ", index, ": bias [", o.bias, ", +", round_up(o.acc), ") of ", p.nconsts, " consts");
  for (const auto& [what, buffer] : {std::pair("site_bias", o.site_bias), std::pair("partial", o.partial)}) {
    if (buffer == -1) continue;
    check_dst(p, index, what, buffer);
    if (p.buffers[buffer].channels != o.acc)
      fail("op ", index, ": ", what, " buffer ", buffer, " has ", p.buffers[buffer].channels, " channels, expected ",
           o.acc);
  }
  ScratchCheck scratch(p, index);
  for (int32_t m = 0; m < o.ncode; ++m) scratch.check(o.code0 + m);
}

void check_items(const Program& p, const char* name, const Item* items, const int32_t* ptr, int32_t groups) {
  if (ptr[0] != 0) fail(name, "_ptr 0 is ", ptr[0], ", expected 0");
  for (int32_t g = 0; g < groups; ++g)
    if (ptr[g + 1] < ptr[g]) fail(name, "_ptr ", g + 1, " is ", ptr[g + 1], ", less than the one before");
  for (int32_t i = 0; i < ptr[groups]; ++i) {
    if (!inside(items[i].op, 1, p.nops)) fail(name, "_item ", i, ": op ", items[i].op, " of ", p.nops);
    if (items[i].count < 1 || items[i].count > (1 << 24)) fail(name, "_item ", i, ": count is ", items[i].count);
    if (items[i].count > 1 && items[i].qstep < 1) fail(name, "_item ", i, ": qstep is ", items[i].qstep);
  }
}

int32_t least_params(const Head& h) {
  switch (h.kind) {
    case kLogisticMixture: return h.channels == 3 && h.phases == 1 ? 10 * h.n : 3 * h.n;
    case kCategorical: return h.n;
    case kBernoulli: return 1;
    case kGaussianMixture: return h.params == 2 * h.n ? 2 * h.n : 3 * h.n;  // one may come without its logit
    default: fail("head: kind is ", h.kind, ", expected 0 to 3");
  }
}

void check_head(const Program& p) {
  const Head& h = p.head;
  validate_head(h);
  if (h.delay != 0 && h.delay != 1) fail("head: delay is ", h.delay, ", expected 0 or 1");
  for (int32_t f = 0; f < h.phases; ++f) {
    const int32_t first = p.param_ptr[f], last = p.param_ptr[f + 1];
    if (last < first || !inside(first, int64_t{last} - first, p.ntaps))
      fail("param_ptr ", f, ": taps [", first, ", ", last, ") of ", p.ntaps);
    int64_t n = 0;
    for (int32_t t = first; t < last; ++t) n += p.taps[t].nchan;
    if (n != h.params) fail("head: phase ", f, " gathers ", n, " parameters, expected ", h.params);
  }
  if (!inside(h.input, 1, p.nbuffers)) fail("head: input buffer ", h.input, " of ", p.nbuffers);
  const Buffer& in = p.buffers[h.input];
  if (in.kind != kInput) fail("head: buffer ", h.input, " is of kind ", in.kind, ", expected an input");
  if (h.enc < 1 || static_cast<int64_t>(h.enc) * h.channels > in.channels)
    fail("head: enc ", h.enc, " x channels ", h.channels, " do not fit the ", in.channels, " channels of the input");
  if (in.rows < p.rows || in.cols < p.cols)
    fail("head: the input buffer is ", in.rows, " x ", in.cols, ", the sample ", p.rows, " x ", p.cols);
  if (h.table == -1 && h.enc != 1) fail("head: enc is ", h.enc, " without a table, expected 1");
  const int64_t classes = h.kind == kBernoulli ? 2 : h.n;
  if (h.table != -1 && (h.kind == kLogisticMixture || h.kind == kGaussianMixture))
    fail("head: a table needs class indices");
  if (h.table != -1 && !inside(h.table, classes * h.enc, p.nconsts))
    fail("head: its table leaves the ", p.nconsts, " consts");
  if (h.start != -1 && !inside(h.start, static_cast<int64_t>(h.channels) * h.enc, p.nconsts))
    fail("head: its start leaves the ", p.nconsts, " consts");
}

}  // namespace

void validate_head(const Head& h) {
  if (h.channels < 1 || h.channels > (1 << 24)) fail("head: channels is ", h.channels, ", expected 1 to 2^24");
  if (h.n < 1 || h.n > (1 << 22)) fail("head: n is ", h.n, ", expected 1 to 2^22");
  if (h.phases != 1 && h.phases != h.channels)
    fail("head: phases is ", h.phases, ", expected 1 or channels = ", h.channels);
  if (h.phases == 1 && h.channels > 1 && !(h.kind == kLogisticMixture && h.channels == 3))
    fail("head: kind ", h.kind, " draws one value a step, so phases must be channels = ", h.channels);
  if (h.kind == kLogisticMixture && h.phases > 1)
    fail("head: a logistic mixture draws a site at once, phases is ", h.phases);
  if (h.params < least_params(h)) fail("head: params is ", h.params, ", expected at least ", least_params(h));
  if (h.kind == kLogisticMixture && (h.levels < 0 || h.levels == 1)) fail("head: levels is ", h.levels);
}

int32_t num_conds(const Program& p) {
  int64_t n = 0;
  for (int32_t b = 0; b < p.nbuffers; ++b)
    if (p.buffers[b].kind == kCond) n = std::max(n, p.buffers[b].offset + 1);
  return static_cast<int32_t>(n);
}

void validate(const Program& p) {
  check_sizes(p);
  for (int32_t i = 0; i < p.nbuffers; ++i) check_buffer(p, i);
  for (int32_t i = 0; i < p.ntaps; ++i) check_tap(p, i);
  for (int32_t i = 0; i < p.nops; ++i) check_op(p, i);
  check_items(p, "row", p.row_items, p.row_ptr, p.period / p.row_len);
  check_items(p, "step", p.step_items, p.step_ptr, p.period);
  check_head(p);
}

}  // namespace fastgen
