#include "lower.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>

#include "../heads.h"
#include "../validate.h"
#include "fibers.h"
#include "fragments.h"
#include "half.h"

namespace fastgen::team {
namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// n rounded up to a stride that spreads the columns a warp touches at once over all banks.
int32_t bank_stride(int64_t n) { return static_cast<int32_t>(round_up(n, 32) + 4); }

class Lowering {
 public:
  Lowering(const Program& program, const LowerOptions& options) : p_(program), o_(options) {}

  std::vector<char> run() {
    validate(p_);
    if (o_.warps < 1 || o_.warps > kMaxTasks) throw std::invalid_argument("warps is out of range");
    buffers_.assign(p_.buffers, p_.buffers + p_.nbuffers);
    consts_.assign(p_.consts, p_.consts + p_.nconsts);
    arena_ = round_up(p_.arena, 16);
    most_sites_.assign(p_.nops, 1);
    for_items([&](const Item& i) { most_sites_[i.op] = std::max(most_sites_[i.op], i.count); });
    for (int32_t op = 0; op < p_.nops; ++op) lower_op(op);
    const int32_t rows = p_.period / p_.row_len;
    for (int32_t r = 0; r < rows; ++r) add_list(p_.row_items, p_.row_ptr[r], p_.row_ptr[r + 1], &row_items_, &row_ptr_);
    for (int32_t t = 0; t < p_.period; ++t)
      add_list(p_.step_items, p_.step_ptr[t], p_.step_ptr[t + 1], &step_items_, &step_ptr_);
    return assemble();
  }

 private:
  template <class F>
  void for_items(F f) const {
    for (int32_t i = 0; i < p_.row_ptr[p_.period / p_.row_len]; ++i) f(p_.row_items[i]);
    for (int32_t i = 0; i < p_.step_ptr[p_.period]; ++i) f(p_.step_items[i]);
  }

  // ---- ops to stages
  // ------------------------------------------------------------------------------------------------- The place where
  // an op's own sites lie in a buffer, from channel 0 on.
  Tap own_site(const Op& op, int32_t buffer) const {
    const Buffer& b = buffers_[buffer];
    return {buffer, 0, b.channels, op.up_i, op.up_j, 1, 1, op.par_i, op.par_j, 0, b.rows, 0, b.cols};
  }

  Tap temporary(int32_t buffer) const { return {buffer, 0, buffers_[buffer].channels, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1}; }

  // The vector program with its places as entries, and what the sums start from as loads and additions before it.
  Code number_places(const Op& op, std::vector<Tap>* entries) const {
    Code code;
    code.acc = op.acc, code.scratch = static_cast<int32_t>(round_up(op.scratch, kPanel));
    for (const int32_t buffer : {op.site_bias, op.partial}) {
      if (buffer < 0) continue;
      entries->push_back(own_site(op, buffer));
      code.micros.push_back({kLoad, code.scratch, static_cast<int32_t>(entries->size()) - 1, 0, 0, op.acc, 0, 0, 0});
      code.micros.push_back({kAdd, 0, 0, code.scratch, 0, op.acc, 0, 0, 0});
      code.scratch += static_cast<int32_t>(round_up(op.acc, kPanel));
    }
    for (int32_t i = 0; i < op.ncode; ++i) {
      Micro m = p_.code[op.code0 + i];
      if (m.fn == kLoad) {
        entries->push_back(p_.taps[m.a]);
        m.a = static_cast<int32_t>(entries->size()) - 1;
      } else if (m.fn == kStore) {
        entries->push_back(own_site(op, m.b));
        m.b = static_cast<int32_t>(entries->size()) - 1;
      }
      code.micros.push_back(m);
    }
    return code;
  }

  void lower_op(int32_t index) {
    const Op& op = p_.ops[index];
    check_order(index);
    first_stage_.push_back(static_cast<int32_t>(stages_.size()));
    std::vector<Tap> entries(p_.taps + op.tap0, p_.taps + op.tap0 + op.ntaps);
    const Code code = number_places(op, &entries);
    Fibers fibers;
    if (split_fibers(code, p_.consts, &fibers)) {
      add_fibers(index, entries, fibers);
      return;
    }
    Code whole = code;
    std::vector<Tap> places(entries.begin() + op.ntaps, entries.end());
    for (Micro& m : whole.micros) {
      if (m.fn == kLoad) m.a -= op.ntaps;
      if (m.fn == kStore) m.b -= op.ntaps;
    }
    if (op.acc > 0) {  // the linear part goes through a temporary
      const int32_t temp = add_temporary(op.acc, most_sites_[index]);
      std::vector<Tap> linear(entries.begin(), entries.begin() + op.ntaps);
      linear.push_back(temporary(temp));
      Code store;
      store.acc = op.acc, store.scratch = static_cast<int32_t>(round_up(op.acc, kPanel));
      store.micros.push_back({kStore, 0, 0, op.ntaps, 0, op.acc, 0, 0, 0});
      split_fibers(store, p_.consts, &fibers);
      add_fibers(index, linear, fibers);
      places.push_back(temporary(temp));
      whole.micros.insert(whole.micros.begin(),
                          {kLoad, 0, static_cast<int32_t>(places.size()) - 1, 0, 0, op.acc, 0, 0, 0});
    }
    add_columns(index, places, whole);
  }

  // Loads run first, so none may follow a store to its buffer.
  void check_order(int32_t index) const {
    const Op& op = p_.ops[index];
    std::set<int32_t> stored;
    for (int32_t i = 0; i < op.ncode; ++i) {
      const Micro& m = p_.code[op.code0 + i];
      if (m.fn == kStore) stored.insert(m.b);
      if (m.fn == kLoad && stored.count(p_.taps[m.a].buf))
        throw std::invalid_argument("op " + std::to_string(index) + " loads what it stored itself");
    }
  }

  int32_t add_temporary(int32_t channels, int32_t sites) {
    buffers_.push_back({channels, 1, sites, 1, sites, kTemp, arena_});
    arena_ += round_up(int64_t{channels} * sites, 16);
    return static_cast<int32_t>(buffers_.size()) - 1;
  }

  Stage start_stage(StageKind kind, int32_t index, const std::vector<Tap>& entries, int32_t ntaps) {
    const Op& op = p_.ops[index];
    Stage s = {};
    s.kind = kind, s.op = index;
    s.q_rows = op.q_rows, s.q_cols = op.q_cols, s.advance = op.advance;
    s.entry0 = static_cast<int32_t>(entries_.size()), s.ntaps = ntaps,
    s.nentries = static_cast<int32_t>(entries.size());
    s.bias = -1;
    int32_t k = 0;
    for (size_t e = 0; e < entries.size(); ++e) {
      entries_.push_back(entries[e]);
      offsets_.push_back(k);
      if (static_cast<int32_t>(e) < ntaps) k += entries[e].nchan;
    }
    return s;
  }

  void add_fibers(int32_t index, const std::vector<Tap>& entries, const Fibers& f) {
    const Op& op = p_.ops[index];
    Stage s = start_stage(kFibers, index, entries, op.ntaps);
    s.fibers = f.fibers, s.rows = f.rows, s.registers = f.registers;
    s.width = f.rows > 0 && kTileRows % f.rows == 0 ? kTileRows / f.rows : kTileRows;
    s.slices = (f.fibers + s.width - 1) / s.width;
    s.k = f.rows > 0 ? op.k : 0;
    s.ksteps = (s.k + kTileDepth - 1) / kTileDepth;
    // As many chunks as warps, for one slice to keep a whole CTA busy; but none shorter than two k-steps.
    s.chunk = std::clamp((s.ksteps + 7) / 8, 2, 32);
    s.nchunks = (s.ksteps + s.chunk - 1) / s.chunk;
    s.instr0 = static_cast<int32_t>(instrs_.size()), s.ninstr = static_cast<int32_t>(f.instrs.size());
    s.nloads = f.nloads;
    instrs_.insert(instrs_.end(), f.instrs.begin(), f.instrs.end());
    pack_linear(op, f, &s);
    choose_tiles(&s);
    stages_.push_back(s);
  }

  // Linear row at place `local` of a slice, -1: none.
  static int32_t row_at(const Fibers& f, const Stage& s, int32_t slice, int32_t local) {
    const int32_t fiber = slice * s.width + local % s.width;
    return fiber < s.fibers ? f.row_of[static_cast<size_t>(fiber) * s.rows + local / s.width] : -1;
  }

  float weight(const Op& op, int32_t row, int32_t k) const {
    const int64_t at = op.weights + (int64_t{row} / kPanel * op.k + k) * kPanel + row % kPanel;
    if (p_.weight_bits == 32) return static_cast<const float*>(p_.weights)[at];
    return from_bfloat16(static_cast<const uint16_t*>(p_.weights)[at]);
  }

  void pack_linear(const Op& op, const Fibers& f, Stage* s) {
    const int32_t local = s->rows * s->width;
    if (op.bias >= 0 && s->rows > 0) {
      s->bias = static_cast<int32_t>(consts_.size());
      for (int32_t i = 0; i < s->slices * local; ++i) {
        const int32_t row = row_at(f, *s, i / local, i % local);
        consts_.push_back(row < 0 ? 0.0f : p_.consts[op.bias + row]);
      }
    }
    s->weights = round_up(static_cast<int64_t>(weights_.size()), 16);
    weights_.resize(s->weights);
    const int32_t depth = s->ksteps * kTileDepth;
    const auto value = [&](int32_t slice, int32_t row, int32_t k) {
      const int32_t linear = row_at(f, *s, slice, row);
      return linear < 0 || k >= s->k ? 0.0f : weight(op, linear, k);
    };
    for (int32_t slice = 0; slice < s->slices; ++slice)
      for (int32_t tile = 0; tile < local / kTileRows; ++tile)
        if (o_.precision == kFloat32) {
          for (int32_t k = 0; k < depth; ++k)
            for (int32_t r = 0; r < kTileRows; ++r) append(value(slice, tile * kTileRows + r, k));
        } else {
          for (int32_t i = 0; i < s->ksteps * kLanes * 8; ++i) {
            const int32_t e = i % 8, lane = i / 8 % kLanes, kstep = i / 8 / kLanes;
            const float w = value(slice, tile * kTileRows + a_row(lane, e), kstep * kTileDepth + a_k(lane, e));
            append(o_.precision == kBfloat16 ? to_bfloat16(w) : to_float16(w));
          }
        }
  }

  template <class T>
  void append(T value) {
    const size_t at = weights_.size();
    weights_.resize(at + sizeof value);
    std::memcpy(weights_.data() + at, &value, sizeof value);
  }

  // The widest block of columns whose staged activations (all of K where possible) and registers fit.
  void choose_tiles(Stage* s) const {
    const int64_t element = o_.precision == kFloat32 ? 4 : 2;
    for (int32_t cols : {64, 32, 16, 8})
      for (int32_t kblock = std::max(s->nchunks, 1); kblock >= 1;
           kblock = cols > 8 || kblock == 1 ? 0 : (kblock + 1) / 2)
        for (int32_t group : {8, 4, 2, 1}) {
          if (group > 1 && group / 2 >= s->slices) continue;
          const int64_t points = round_up(int64_t{s->nentries} * cols * 8, 16);
          if (points > kMaxPoints * 8 && cols > 8) continue;
          const int32_t local = s->rows * s->width;
          s->cols = cols, s->group = group, s->kblock = kblock;
          s->ldb = s->k > 0 ? kblock * s->chunk * kTileDepth + 8 : 0;
          s->lds = bank_stride(s->registers * s->width);
          s->ldp = bank_stride(group * local);
          s->at_b = static_cast<int32_t>(points);
          s->at_s = static_cast<int32_t>(s->at_b + round_up(int64_t{s->ldb} * cols * element, 16));
          s->at_p = static_cast<int32_t>(s->at_s + round_up(int64_t{s->lds} * cols * group * 4, 16));
          const int64_t partial = s->nchunks > 1 ? int64_t{kblock} * bank_stride(local) * kTileCols * 4 : 0;
          if (s->at_p + partial <= o_.shared_bytes) return;
        }
    throw std::invalid_argument("op " + std::to_string(s->op) + " (" + std::to_string(s->k) + " channels in, " +
                                std::to_string(s->registers) + " registers, " + std::to_string(s->nentries) +
                                " places) does not fit " + std::to_string(o_.shared_bytes) + " bytes of shared memory");
  }

  void add_columns(int32_t index, const std::vector<Tap>& places, const Code& code) {
    Stage s = start_stage(kColumns, index, places, 0);
    s.code0 = static_cast<int32_t>(code_.size()), s.ncode = static_cast<int32_t>(code.micros.size());
    s.scratch = static_cast<int32_t>(round_up(code.scratch, 4));
    s.slices = 1, s.cols = 1;
    code_.insert(code_.end(), code.micros.begin(), code.micros.end());
    const int64_t needed = int64_t{s.scratch} * 4;  // at least one warp at a time
    if (needed > o_.shared_bytes)
      throw std::invalid_argument("op " + std::to_string(index) + ": its vector program needs " +
                                  std::to_string(needed) + " bytes of shared memory, and there are " +
                                  std::to_string(o_.shared_bytes));
    stages_.push_back(s);
  }

  // ---- schedule
  // ------------------------------------------------------------------------------------------------------
  void add_list(const Item* items, int32_t begin, int32_t end, std::vector<StageItem>* out, std::vector<int32_t>* ptr) {
    std::set<int32_t> read, written;  // since the last barrier
    for (int32_t i = begin; i < end; ++i) {
      const Item& item = items[i];
      const int32_t first = first_stage_[item.op];
      const int32_t last = item.op + 1 < p_.nops ? first_stage_[item.op + 1] : static_cast<int32_t>(stages_.size());
      for (int32_t s = first; s < last; ++s) {
        std::set<int32_t> reads, writes;
        touch(stages_[s], &reads, &writes);
        const bool sync = meets(reads, written) || meets(writes, written) || meets(writes, read);
        if (sync) read.clear(), written.clear();
        read.insert(reads.begin(), reads.end()), written.insert(writes.begin(), writes.end());
        out->push_back({s, item.q0, item.count, item.qstep, sync});
      }
    }
    ptr->push_back(static_cast<int32_t>(out->size()));
  }

  static bool meets(const std::set<int32_t>& a, const std::set<int32_t>& b) {
    return std::any_of(a.begin(), a.end(), [&](int32_t x) { return b.count(x) > 0; });
  }

  // Buffers a stage reads and writes.
  void touch(const Stage& s, std::set<int32_t>* reads, std::set<int32_t>* writes) const {
    std::set<int32_t> stores;  // entries
    if (s.kind == kFibers) {
      for (int32_t i = 0; i < s.ninstr; ++i)
        if (instrs_[s.instr0 + i].fn == kStore) stores.insert(instrs_[s.instr0 + i].b);
    } else {
      for (int32_t i = 0; i < s.ncode; ++i)
        if (code_[s.code0 + i].fn == kStore) stores.insert(code_[s.code0 + i].b);
    }
    for (int32_t e = 0; e < s.nentries; ++e) (stores.count(e) ? writes : reads)->insert(entries_[s.entry0 + e].buf);
  }

  // ---- the block
  // -----------------------------------------------------------------------------------------------------
  std::vector<char> assemble() {
    Header h = {};
    std::vector<char> block(round_up(sizeof h, 16));
    const auto put = [&](const void* data, size_t bytes) {
      const int64_t at = static_cast<int64_t>(block.size());
      block.resize(round_up(at + static_cast<int64_t>(bytes), 16));
      if (bytes > 0) std::memcpy(block.data() + at, data, bytes);
      return at;
    };
    const auto put_all = [&](const auto& v) { return put(v.data(), v.size() * sizeof v[0]); };
    h.buffers = put_all(buffers_), h.entries = put_all(entries_), h.offsets = put_all(offsets_);
    h.instrs = put_all(instrs_), h.code = put_all(code_), h.stages = put_all(stages_);
    h.row_items = put_all(row_items_), h.row_ptr = put_all(row_ptr_);
    h.step_items = put_all(step_items_), h.step_ptr = put_all(step_ptr_);
    h.step_site = put(p_.step_site, sizeof(int32_t) * p_.period);
    h.consts = put_all(consts_);
    h.head_taps = put(p_.taps + p_.head.tap0, sizeof(Tap) * p_.head.tap_ptr[p_.head.phases]);
    h.weights = put_all(weights_);
    h.nbuffers = static_cast<int32_t>(buffers_.size()), h.nentries = static_cast<int32_t>(entries_.size());
    h.ninstrs = static_cast<int32_t>(instrs_.size()), h.nstages = static_cast<int32_t>(stages_.size());
    h.precision = o_.precision, h.shared_bytes = o_.shared_bytes, h.warps = o_.warps;
    h.rows = p_.rows, h.cols = p_.cols, h.row_len = p_.row_len, h.period = p_.period;
    h.steps = p_.steps, h.arena = arena_, h.head = p_.head;
    h.draw_floats = static_cast<int32_t>(round_up(p_.head.params + kDrawScratch, 4));
    if (int64_t{h.draw_floats} * 4 > o_.shared_bytes)
      throw std::invalid_argument("head: " + std::to_string(p_.head.params) + " parameters do not fit " +
                                  std::to_string(o_.shared_bytes) + " bytes of shared memory");
    h.bytes = static_cast<int64_t>(block.size());
    std::memcpy(block.data(), &h, sizeof h);
    return block;
  }

  const Program& p_;
  const LowerOptions o_;
  std::vector<Buffer> buffers_;
  std::vector<Tap> entries_;
  std::vector<int32_t> offsets_;  // of each linear tap: its first channel in K
  std::vector<Instr> instrs_;
  std::vector<Micro> code_;
  std::vector<Stage> stages_;
  std::vector<StageItem> row_items_, step_items_;
  std::vector<int32_t> row_ptr_{0}, step_ptr_{0};
  std::vector<float> consts_;
  std::vector<char> weights_;
  std::vector<int32_t> first_stage_, most_sites_;
  int64_t arena_ = 0;
};

}  // namespace

std::vector<char> lower(const Program& program, const LowerOptions& options) {
  return Lowering(program, options).run();
}

}  // namespace fastgen::team
