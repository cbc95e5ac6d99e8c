#include "lower.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>

#include "../heads.h"
#include "../validate.h"
#include "fibers.h"
#include "linear.h"

namespace fastgen::team {
namespace {

class Lowering {
 public:
  Lowering(const Program& program, const LowerOptions& options) : p_(program), o_(options) {}

  std::vector<char> run() {
    validate(p_);
    buffers_.assign(p_.buffers, p_.buffers + p_.nbuffers);
    consts_.assign(p_.consts, p_.consts + p_.nconsts);
    arena_ = round_up(p_.arena, 16);
    most_sites_.assign(p_.nops, 1);
    for_items([&](const Item& i) { most_sites_[i.op] = std::max(most_sites_[i.op], i.count); });
    for (int32_t op = 0; op < p_.nops; ++op) lower_op(op);
    first_stage_.push_back(static_cast<int32_t>(stages_.size()));
    for (int32_t phase = 0; phase < p_.head.phases; ++phase) add_draw(phase);
    fit_shared_memory();
    for (Draft& d : stages_) write_descriptor(d);
    make_schedule();
    return assemble();
  }

 private:
  template <class F>
  void for_items(F f) const {
    for (int32_t i = 0; i < p_.row_ptr[p_.period / p_.row_len]; ++i) f(p_.row_items[i]);
    for (int32_t i = 0; i < p_.step_ptr[p_.period]; ++i) f(p_.step_items[i]);
  }

  // ---- ops to stages ----
  // The place where an op's own sites lie in a buffer, from channel 0 on.
  Tap own_site(const Op& op, int32_t buffer) const {
    const Buffer& b = p_.buffers[buffer];
    return {buffer, 0, b.channels, op.up_i, op.up_j, 1, 1, op.par_i, op.par_j, 0, b.rows, 0, b.cols};
  }

  Tap temporary(int32_t buffer) const { return {buffer, 0, buffers_[buffer].channels, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1}; }

  // The vector program with its places numbered, and what the sums start from as loads and additions before it.
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

  // A stage under way: its record, and what its descriptor will hold behind it.
  struct Draft {
    Stage stage = {};
    std::vector<Place> places;
    std::vector<Instr> instrs;
    std::vector<Micro> micros;
    std::set<int32_t> reads, writes;  // buffers
    int32_t descriptor = 0, bytes = 0;
  };

  Place place_of(const Tap& t, int32_t k) const {
    const Buffer& b = buffers_[t.buf];
    const bool whole = b.kind == kCond || b.kind == kConst;
    Place p = {};
    p.offset = b.kind == kCond ? 0 : b.offset;
    p.cond = b.kind == kCond ? static_cast<int32_t>(b.offset) : 0;
    p.kind = b.kind, p.chan = t.chan, p.nchan = t.nchan, p.channels = b.channels;
    p.ring_rows = whole ? b.rows : b.ring_rows, p.ring_cols = whole ? b.cols : b.ring_cols;
    p.mul_i = t.mul_i, p.mul_j = t.mul_j, p.div_i = t.div_i, p.div_j = t.div_j, p.off_i = t.off_i, p.off_j = t.off_j;
    p.lo_i = t.lo_i, p.hi_i = t.hi_i, p.lo_j = t.lo_j, p.hi_j = t.hi_j, p.k = k;
    return p;
  }

  Draft start_stage(StageKind kind, int32_t index, const std::vector<Tap>& taps, int32_t ntaps) const {
    Draft d;
    Stage& s = d.stage;
    s.kind = kind, s.op = index;
    if (index >= 0) s.q_rows = p_.ops[index].q_rows, s.q_cols = p_.ops[index].q_cols, s.advance = p_.ops[index].advance;
    if (static_cast<int64_t>(s.q_rows) * s.q_cols > INT32_MAX)
      throw std::invalid_argument("op " + std::to_string(index) + ": its grid has 2^31 sites or more");
    s.ntaps = ntaps, s.nplaces = static_cast<int32_t>(taps.size());
    s.bias = -1;
    int32_t k = 0;
    for (size_t e = 0; e < taps.size(); ++e) {
      d.places.push_back(place_of(taps[e], k));
      if (static_cast<int32_t>(e) >= ntaps) continue;
      k += taps[e].nchan, s.widest = std::max(s.widest, taps[e].nchan);
    }
    return d;
  }

  template <class T>
  static int64_t bytes_of(const std::vector<T>& v) {
    return static_cast<int64_t>(v.size() * sizeof(T));
  }

  // stores: places that the stage writes.
  void add_stage(Draft d, const std::vector<Tap>& taps, const std::set<int32_t>& stores) {
    for (int32_t e = 0; e < d.stage.nplaces; ++e) (stores.count(e) ? d.writes : d.reads).insert(taps[e].buf);
    d.stage.places = static_cast<int32_t>(round_up(sizeof(Stage), 16));
    d.stage.code = static_cast<int32_t>(round_up(d.stage.places + bytes_of(d.places), 16));
    d.bytes =
        static_cast<int32_t>(round_up(d.stage.code + bytes_of(d.instrs) + bytes_of(d.micros) + sizeof(Instr), 16));
    stages_.push_back(std::move(d));
  }

  // What two descriptors leave of shared memory is for the stages; tiles are chosen to fit it.
  void fit_shared_memory() {
    for (const Draft& d : stages_) descriptor_bytes_ = std::max(descriptor_bytes_, d.bytes);
    work_bytes_ = o_.shared_bytes - kDescriptorsAt - 2 * descriptor_bytes_;
    for (Draft& d : stages_) {
      if (d.stage.kind == kFibers) choose_tiles(o_.precision, work_bytes_, &d.stage);
      const int64_t scratch = int64_t{d.stage.scratch} * 4;  // columns: at least one warp at a time
      if (scratch > work_bytes_)
        throw std::invalid_argument("op " + std::to_string(d.stage.op) + ": its vector program does not fit " +
                                    std::to_string(work_bytes_) + " bytes of shared memory");
    }
  }

  void write_descriptor(Draft& d) {
    d.descriptor = static_cast<int32_t>(descriptors_.size() / 16);
    descriptors_.resize(descriptors_.size() + d.bytes);
    char* to = descriptors_.data() + descriptors_.size() - d.bytes;
    std::memcpy(to, &d.stage, sizeof(Stage));
    if (!d.places.empty()) std::memcpy(to + d.stage.places, d.places.data(), bytes_of(d.places));
    if (!d.instrs.empty()) std::memcpy(to + d.stage.code, d.instrs.data(), bytes_of(d.instrs));
    if (!d.micros.empty()) std::memcpy(to + d.stage.code, d.micros.data(), bytes_of(d.micros));
  }

  void add_fibers(int32_t index, const std::vector<Tap>& taps, const Fibers& f) {
    const Op& op = p_.ops[index];
    Draft d = start_stage(kFibers, index, taps, op.ntaps);
    Stage& s = d.stage;
    s.nloads = f.nloads, s.ncode = static_cast<int32_t>(f.instrs.size());
    d.instrs = f.instrs;
    shape_linear(f, op.k, &s);
    pack_linear(p_, op, f, o_.precision, &s, &weights_, &consts_);
    std::set<int32_t> stores;
    for (const Instr& i : f.instrs)
      if (i.fn == kStore) stores.insert(i.b);
    add_stage(std::move(d), taps, stores);
  }

  void add_columns(int32_t index, const std::vector<Tap>& taps, const Code& code) {
    Draft d = start_stage(kColumns, index, taps, 0);
    d.stage.ncode = static_cast<int32_t>(code.micros.size());
    d.stage.scratch = static_cast<int32_t>(round_up(code.scratch, 4));
    d.micros = code.micros;
    std::set<int32_t> stores;
    for (const Micro& m : code.micros)
      if (m.fn == kStore) stores.insert(m.b);
    add_stage(std::move(d), taps, stores);
  }

  // The draw of one phase: its places are the parameters.
  void add_draw(int32_t phase) {
    const std::vector<Tap> mine(p_.taps + p_.param_ptr[phase], p_.taps + p_.param_ptr[phase + 1]);
    Draft d = start_stage(kDraw, -1, mine, 0);
    d.stage.phase = phase;
    d.writes.insert(p_.head.input);
    add_stage(std::move(d), mine, {});
  }

  // ---- schedule ----
  // Row items, step items and draws of a period in one list. A barrier stands before a stage that reads what was
  // written, or writes what was read or written, since the last; and before every step, where all look whether to stop.
  void make_schedule() {
    for (int32_t t = 0; t < p_.period; ++t) {
      start_step_ = true;
      if (t % p_.row_len == 0) {
        const int32_t* row = p_.row_ptr + t / p_.row_len;
        for (int32_t i = row[0]; i < row[1]; ++i) schedule(p_.row_items[i]);
      }
      for (int32_t i = p_.step_ptr[t]; i < p_.step_ptr[t + 1]; ++i) schedule(p_.step_items[i]);
      const int32_t advance = p_.period / p_.head.phases;  // site_of_step: sites of a period
      schedule_stage(first_stage_[p_.nops] + p_.step_phase[t], {-1, p_.step_site[t], 1, advance});
    }
  }

  void schedule(const Item& item) {
    for (int32_t s = first_stage_[item.op]; s < first_stage_[item.op + 1]; ++s) schedule_stage(s, item);
  }

  void schedule_stage(int32_t index, const Item& item) {
    const Draft& d = stages_[index];
    const bool sync = start_step_ || meets(d.reads, written_) || meets(d.writes, written_) || meets(d.writes, read_);
    if (sync) read_.clear(), written_.clear();
    read_.insert(d.reads.begin(), d.reads.end()), written_.insert(d.writes.begin(), d.writes.end());
    items_.push_back({d.descriptor, d.bytes, d.stage.op, item.q0, item.count, item.qstep, sync, start_step_});
    start_step_ = false;
  }

  static bool meets(const std::set<int32_t>& a, const std::set<int32_t>& b) {
    return std::any_of(a.begin(), a.end(), [&](int32_t x) { return b.count(x) > 0; });
  }

  // ---- the block ----
  std::vector<char> assemble() {
    Header h = {};
    std::vector<char> block(kHeaderBytes);
    const auto put = [&](const auto& v) {
      const int64_t at = static_cast<int64_t>(block.size()), bytes = static_cast<int64_t>(v.size() * sizeof v[0]);
      block.resize(round_up(at + bytes, 16));
      if (bytes > 0) std::memcpy(block.data() + at, v.data(), bytes);
      return at;
    };
    h.items = put(items_), h.descriptors = put(descriptors_), h.consts = put(consts_), h.weights = put(weights_);
    h.nitems = static_cast<int32_t>(items_.size());
    h.precision = o_.precision;
    h.shared_bytes = o_.shared_bytes, h.descriptor_bytes = descriptor_bytes_;
    h.work_at = kDescriptorsAt + 2 * descriptor_bytes_, h.work_bytes = work_bytes_;
    h.rows = p_.rows, h.cols = p_.cols, h.row_len = p_.row_len, h.period = p_.period;
    h.nstages = first_stage_[p_.nops];
    for (const Draft& d : stages_) h.ncolumn_stages += d.stage.kind == kColumns;
    h.steps = p_.steps, h.arena = arena_, h.head = p_.head;
    const Buffer& input = buffers_[p_.head.input];
    h.input = place_of({p_.head.input, 0, input.channels, 1, 1, 1, 1, 0, 0, 0, input.rows, 0, input.cols}, 0);
    h.draw_floats = static_cast<int32_t>(round_up(p_.head.params + kDrawScratch, 4));
    if (int64_t{h.draw_floats} * 4 > work_bytes_)
      throw std::invalid_argument("head: " + std::to_string(p_.head.params) + " parameters do not fit " +
                                  std::to_string(o_.shared_bytes) + " bytes of shared memory");
    if (static_cast<int64_t>(items_.size()) > INT32_MAX)
      throw std::invalid_argument("the schedule has 2^31 items or more");
    h.bytes = static_cast<int64_t>(block.size());
    std::memcpy(block.data(), &h, sizeof h);
    return block;
  }

  const Program& p_;
  const LowerOptions o_;
  int32_t descriptor_bytes_ = 0, work_bytes_ = 0;
  std::vector<Buffer> buffers_;  // temporaries at the end
  std::vector<Draft> stages_;
  std::vector<int32_t> first_stage_;  // of each op; then of the draws
  std::vector<int32_t> most_sites_;   // of an item of each op
  std::vector<char> descriptors_, weights_;
  std::vector<StageItem> items_;
  std::vector<float> consts_;
  std::set<int32_t> read_, written_;  // buffers, since the last barrier
  bool start_step_ = false;
  int64_t arena_ = 0;
};

}  // namespace

std::vector<char> lower(const Program& program, const LowerOptions& options) {
  return Lowering(program, options).run();
}

}  // namespace fastgen::team
