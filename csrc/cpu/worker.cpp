// How a stage is shared. The work of a linear part is a rectangle, panels x columns. With few columns the ranks divide
// the panels (each streams its own weights, always the same ones, so they stay in its cache), and the vector program,
// which needs all channels of a column, follows after a barrier. With many columns they divide the columns, and
// every rank carries its own through linear part and program, block by block, with no barrier between. Small stages
// stay on rank 0. None of this changes a byte: see kernels.cpp.
#include "worker.h"

#include <algorithm>
#include <cstring>

#include "../heads.h"

namespace fastgen {
namespace {

constexpr int64_t kBlock = 64;                  // columns whose taps are pointed at together
constexpr int64_t kBlockFloats = 64 << 10;      // scratch of a block should stay in a core's second-level cache
constexpr double kBarrierCycles = 800;
constexpr double kBytesPerCycle = 6;            // of weights from memory, per core

int64_t stride(const Stage& stage) { return (stage.op.scratch + kPanel - 1) / kPanel * kPanel; }

int64_t floor_div(int64_t a, int32_t b) {
  if (b == 1) return a;
  const int64_t q = a / b;
  return q * b > a ? q - 1 : q;
}

}  // namespace

Worker::Worker(const Run& run, int rank)
    : run_(run), program_(run.tables.program()), rank_(rank), slots_(run.args.slots), splits_(program_.nops) {
  sites_.reserve(run.tables.max_count);
  x_.resize(run.tables.max_taps * kBlock);
  int64_t floats = 0;
  for (const Stage& s : run.tables.stages())
    floats = std::max(floats, stride(s) * std::clamp<int64_t>(kBlockFloats / (stride(s) + 1), 1, kBlock));
  private_scratch_.resize(floats + kPanel);
  params_.resize(program_.head.params);
  uniforms_.resize((head_uniforms(program_.head) + 3) / 4 * 4);  // they are made four at a time
  values_.resize(program_.head.channels);
  known_.resize(program_.head.channels);
}

void Worker::sync() {
  run_.pool.barrier();
  pending_ = kNobody;
}

void Worker::run_items(const Item* begin, const Item* end, int64_t period) {
  for (const Item* item = begin; item != end; ++item) {
    const Stage& stage = run_.tables.stages()[item->op];
    const int64_t grid = static_cast<int64_t>(stage.op.q_rows) * stage.op.q_cols;
    sites_.clear();
    for (int32_t m = 0; m < item->count; ++m) {
      const int64_t q = item->q0 + static_cast<int64_t>(m) * item->qstep + stage.op.advance * period;
      if (q >= 0 && q < grid)
        sites_.push_back({static_cast<int32_t>(q / stage.op.q_cols), static_cast<int32_t>(q % stage.op.q_cols)});
    }
    if (!sites_.empty()) run_stage(stage);
  }
}

// Picks the cheapest way by a rough count of cycles.
const Worker::Split& Worker::split(const Stage& stage, int64_t columns) {
  Split& best = splits_[&stage - run_.tables.stages().data()];
  if (best.for_columns == columns) return best;
  best = Split{columns};
  const int threads = run_.pool.threads();
  const double panel_bytes = static_cast<double>(stage.op.k) * kPanel * run_.tables.weight_bytes();
  const auto linear = [&](int64_t panels, int64_t cols) {
    return panels * std::max(cols * stage.linear_cycles, panel_bytes / kBytesPerCycle);
  };
  const double programs = stage.program_cycles * columns;
  double least = linear(stage.panels, columns) + programs;
  for (int c = 1; c <= threads && c <= columns; ++c) {
    const int64_t part = (columns + c - 1) / c;
    const int p = static_cast<int>(std::min<int64_t>(threads / c, stage.panels));
    if (c > 1) {
      const double apart = linear(stage.panels, part) + stage.program_cycles * part + 2 * kBarrierCycles;
      if (apart < least) least = apart, best.panels = 1, best.columns = c, best.share_program = true;
    }
    if (p > 1) {
      const int64_t share = (columns + threads - 1) / threads;
      const bool worth = programs - stage.program_cycles * share > kBarrierCycles;
      const double together = linear((stage.panels + p - 1) / p, part) +
                              (worth ? stage.program_cycles * share : programs) + 3 * kBarrierCycles;
      if (together < least) least = together, best.panels = p, best.columns = c, best.share_program = worth;
    }
  }
  return best;
}

void Worker::run_stage(const Stage& stage) {
  const int64_t columns = static_cast<int64_t>(sites_.size()) * slots_;
  const Split& s = split(stage, columns);
  if (s.panels == 1 && s.columns == 1) {
    if (pending_ == kAll) sync();
    if (rank_ == 0) run_alone(stage, {0, columns});
    pending_ = kRoot;
    return;
  }
  if (pending_ != kNobody) sync();
  if (s.panels > 1) {
    run_together(stage, s, columns);
  } else {
    if (rank_ < s.columns) run_alone(stage, share(columns, s.columns, rank_));
    pending_ = kAll;
  }
}

void Worker::run_alone(const Stage& stage, Range columns) {
  const int64_t ld = stride(stage);
  const int64_t block = std::clamp<int64_t>(kBlockFloats / (ld + 1), 1, kBlock);
  float* scratch = private_scratch_.data();
  scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64 / sizeof(float);
  for (int64_t c = columns.begin; c < columns.end; c += block) {
    const Range part{c, std::min(c + block, columns.end)};
    linear(stage, part, {0, stage.panels}, scratch);
    for (int64_t i = part.begin; i < part.end; ++i) program(stage, i, scratch + (i - c) * ld);
  }
}

void Worker::run_together(const Stage& stage, const Split& s, int64_t columns) {
  const int64_t ld = stride(stage);
  const int64_t block = std::max<int64_t>(run_.scratch_floats / ld, 1);
  const Range panels = share(stage.panels, s.panels, rank_ % s.panels);
  for (int64_t c = 0; c < columns; c += block) {
    if (c > 0) sync();
    const int64_t n = std::min(block, columns - c);
    if (rank_ / s.panels < s.columns) {
      const Range mine = share(n, s.columns, rank_ / s.panels);
      for (int64_t i = mine.begin; i < mine.end; i += kBlock)
        linear(stage, {c + i, c + std::min(i + kBlock, mine.end)}, panels, run_.scratch + i * ld);
    }
    sync();
    const Range programs = s.share_program ? share(n, run_.pool.threads(), rank_) : Range{0, rank_ == 0 ? n : 0};
    for (int64_t i = programs.begin; i < programs.end; ++i) program(stage, c + i, run_.scratch + i * ld);
    pending_ = s.share_program ? kAll : kRoot;
  }
}

// The linear part of at most kBlock columns and some panels; the first column's scratch is at `scratch`.
void Worker::linear(const Stage& stage, Range columns, Range panels, float* scratch) {
  if (panels.begin == panels.end || columns.begin == columns.end) return;
  start_columns(stage, columns, panels, scratch);
  if (stage.op.k == 0) return;
  point_columns(stage, columns);
  run_tiles(stage, columns.end - columns.begin, panels, scratch);
}

// Where tap `tap` of iteration site (i, j) is read in slot 0, or null when that is out of bounds.
const float* Worker::source(const Tap& t, int64_t i, int64_t j) const {
  const int64_t row = floor_div(i * t.mul_i + t.off_i, t.div_i);
  const int64_t col = floor_div(j * t.mul_j + t.off_j, t.div_j);
  if (row < t.lo_i || row >= t.hi_i || col < t.lo_j || col >= t.hi_j) return nullptr;
  return run_.places[t.buf].at(row, col, t.chan);
}

// Out-of-bounds taps read zeros rather than being skipped: the same operations whatever the neighbours in the tile.
void Worker::point_columns(const Stage& stage, Range columns) {
  for (int32_t t = 0; t < stage.op.ntaps; ++t) {
    const Tap& tap = stage.taps[t];
    const int64_t step = run_.places[tap.buf].slot;
    const float** x = x_.data() + t * kBlock;
    int64_t slot = columns.begin % slots_;
    for (int64_t c = columns.begin, m = c / slots_; c < columns.end; ++m, slot = 0) {
      const float* from = source(tap, sites_[m].i, sites_[m].j);
      for (; slot < slots_ && c < columns.end; ++slot, ++c) *x++ = from ? from + slot * step : run_.zeros;
    }
  }
}

// bias + site_bias + partial: what the accumulators start from.
void Worker::start_columns(const Stage& stage, Range columns, Range panels, float* scratch) {
  const Op& op = stage.op;
  const int64_t first = panels.begin * kPanel, padded = panels.end * kPanel - first;
  const int n = static_cast<int>(std::min<int64_t>(op.acc - first, padded));
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    float* acc = scratch + (c - columns.begin) * stride(stage) + first;
    if (op.bias >= 0)
      std::memcpy(acc, program_.consts + op.bias + first, padded * sizeof(float));
    else
      std::memset(acc, 0, padded * sizeof(float));
    for (const int32_t buffer : {op.site_bias, op.partial}) {
      if (buffer < 0) continue;
      const Site q = sites_[c / slots_];
      const Place& place = run_.places[buffer];
      const float* more = place.at(int64_t{q.i} * op.up_i + op.par_i, int64_t{q.j} * op.up_j + op.par_j, 0);
      run_.kernels.add(acc, more + c % slots_ * place.slot + first, n);
    }
  }
}

void Worker::run_tiles(const Stage& stage, int64_t columns, Range panels, float* scratch) {
  const Kernels& k = run_.kernels;
  const bool half = program_.weight_bits == 16;
  const int64_t step = static_cast<int64_t>(stage.op.k) * kPanel, ld = stride(stage);
  // As many panels at a time as leave registers for all columns; when columns abound, the tile that is best for that.
  int most = kMaxPanels;
  while (most > k.gemm_panels && k.max_columns[most] < columns) --most;
  const int64_t groups = (panels.end - panels.begin + most - 1) / most;
  for (int g = 0; g < groups; ++g) {
    const Range part = share(panels.end - panels.begin, groups, g);
    const int height = static_cast<int>(part.end - part.begin);
    const int64_t first = panels.begin + part.begin;
    const char* weights = stage.weights + first * step * run_.tables.weight_bytes();
    const int64_t tiles = (columns + k.max_columns[height] - 1) / k.max_columns[height];
    for (int i = 0; i < tiles; ++i) {
      const Range c = share(columns, tiles, i);
      k.tile[half][height][c.end - c.begin](weights, step, stage.nchan.data(), stage.op.ntaps, x_.data() + c.begin,
                                            kBlock, scratch + c.begin * ld + first * kPanel, ld);
    }
  }
}

void Worker::program(const Stage& stage, int64_t column, float* scratch) {
  const auto operand = [&](int32_t x) { return x >= 0 ? scratch + x : program_.consts + ~x; };
  for (const Instruction& in : stage.code) {
    const Micro& m = in.micro;
    if (in.map)
      in.map(scratch + m.dst, operand(m.a), operand(m.b), operand(m.c), m.n, &m.imm0);
    else
      move(stage, m, sites_[column / slots_], column % slots_, scratch);
  }
}

void Worker::move(const Stage& stage, const Micro& m, Site q, int64_t slot, float* scratch) {
  const auto operand = [&](int32_t x) { return x >= 0 ? scratch + x : program_.consts + ~x; };
  float* dst = scratch + m.dst;
  const size_t bytes = m.n * sizeof(float);
  switch (m.fn) {
    case kLoad: {
      const Tap& tap = program_.taps[m.a];
      if (const float* from = source(tap, q.i, q.j))
        std::memcpy(dst, from + slot * run_.places[tap.buf].slot, bytes);
      else
        std::fill_n(dst, m.n, m.imm0);
      return;
    }
    case kStore: {
      const Op& op = stage.op;
      const Place& place = run_.places[m.b];
      float* to = place.at(int64_t{q.i} * op.up_i + op.par_i, int64_t{q.j} * op.up_j + op.par_j, m.c);
      std::memcpy(to + slot * place.slot, operand(m.a), bytes);
      return;
    }
    case kEmbed: {
      const float x = *operand(m.a);
      const float row = x > 0 ? std::min(x, m.imm0 - 1) : 0;  // NaN: row 0
      std::memcpy(dst, program_.consts + m.b + static_cast<int64_t>(row) * m.n, bytes);
      return;
    }
    case kGather: {
      const float* from = operand(m.a);
      const float* index = program_.consts + m.b;
      for (int32_t k = 0; k < m.n; ++k) dst[k] = from[static_cast<int32_t>(index[k])];
      return;
    }
    case kCopy: std::memmove(dst, operand(m.a), bytes); return;
    case kFill: std::fill_n(dst, m.n, m.imm0); return;
    case kBroadcast: std::fill_n(dst, m.n, *operand(m.a)); return;
  }
}

}  // namespace fastgen
