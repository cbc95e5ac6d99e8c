#include "tables.h"

#include <algorithm>
#include <cstring>

#include "../functions.h"
#include "../validate.h"

namespace fastgen {
namespace {

template <class T>
const T* keep(std::vector<T>* mine, const T* theirs, int64_t n) {
  mine->assign(theirs, theirs + n);
  return mine->data();
}

}  // namespace

Tables::Tables(const Program& p, const Kernels& kernels) : program_(p) {
  validate(p);
  program_.buffers = keep(&buffers_, p.buffers, p.nbuffers);
  program_.taps = keep(&taps_, p.taps, p.ntaps);
  program_.code = keep(&code_, p.code, p.ncode);
  program_.ops = keep(&ops_, p.ops, p.nops);
  const int32_t rows = p.period / p.row_len;
  program_.row_ptr = keep(&row_ptr_, p.row_ptr, rows + 1);
  program_.step_ptr = keep(&step_ptr_, p.step_ptr, p.period + 1);
  program_.row_items = keep(&row_items_, p.row_items, p.row_ptr[rows]);
  program_.step_items = keep(&step_items_, p.step_items, p.step_ptr[p.period]);
  program_.step_site = keep(&step_site_, p.step_site, p.period);
  program_.step_phase = keep(&step_phase_, p.step_phase, p.period);
  program_.param_ptr = keep(&param_ptr_, p.param_ptr, p.head.phases + 1);
  program_.consts = keep(&consts_, p.consts, p.nconsts);
  const size_t bytes = static_cast<size_t>(p.nweights) * weight_bytes();
  weights_ = Pages(bytes, "weights");
  if (bytes > 0) std::memcpy(weights_.as<char>(), p.weights, bytes);
  program_.weights = weights_.as<char>();

  for (const Op& op : ops_) {
    ready_ops_.push_back(make_ready(op, kernels));
    max_taps = std::max(max_taps, op.ntaps);
    for (int32_t n : ready_ops_.back().nchan) max_nchan = std::max(max_nchan, n);
  }
  for (const std::vector<Item>* items : {&row_items_, &step_items_})
    for (const Item& item : *items) max_count = std::max(max_count, item.count);
}

ReadyOp Tables::make_ready(const Op& op, const Kernels& kernels) const {
  ReadyOp s = {};
  s.op = op;
  s.panels = (op.acc + kPanel - 1) / kPanel;
  s.stride = (op.scratch + kPanel - 1) / kPanel * kPanel;
  s.taps = taps_.data() + op.tap0;
  for (int32_t t = 0; t < op.ntaps; ++t) s.nchan.push_back(s.taps[t].nchan);
  if (op.k > 0) s.weights = weights_.as<char>() + op.weights * weight_bytes();
  s.linear_cycles = op.k * (double(kPanel) / kernels.width);
  for (int32_t i = 0; i < op.ncode; ++i) {
    Micro m = code_[op.code0 + i];
    const int operands = arity(m.fn);
    if (operands == 1) m.b = m.c = m.a;
    if (operands == 2) m.c = m.a;
    s.code.push_back({kernels.map[m.fn], m});
    s.program_cycles += 20 + cycles_of(m.fn) * (m.n + kernels.width - 1) / kernels.width;
  }
  return s;
}

}  // namespace fastgen
