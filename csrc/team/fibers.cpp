// Every number a vector program makes is a node; lanes that feed each other are joined (union-find), and what is joined
// is a fiber. Scalars that depend on no lane (a load of one channel and maps of it) join nothing: every fiber makes
// them for itself. Then each micro-op falls into runs of consecutive lanes that belong to consecutive fibers and read
// the same registers, and a run is one instruction.
#include "fibers.h"

#include <algorithm>
#include <map>

#include "maps.h"

namespace fastgen::team {
namespace {

constexpr int32_t kMaxRows = 8;
constexpr size_t kMaxInstrs = 96;

bool reduces(int32_t fn) { return function_kind(fn) == FunctionKind::Reduce; }

struct Node {
  int32_t micro;  // -1: a linear row
  int32_t lane;
  bool uniform;
};

class Splitter {
 public:
  Splitter(const Code& code, const float* consts) : code_(code), consts_(consts), at_(code.scratch, -1) {}

  bool run(Fibers* out) {
    for (int32_t r = 0; r < code_.acc; ++r) at_[r] = add_node({-1, r, false});
    for (size_t m = 0; m < code_.micros.size(); ++m)
      if (!trace(static_cast<int32_t>(m))) return false;
    number_fibers(out);
    if (out->rows > kMaxRows) return false;
    emit(out);
    if (out->instrs.size() > kMaxInstrs) return false;
    allocate(out);
    return true;
  }

 private:
  int32_t add_node(Node node) {
    nodes_.push_back(node);
    parent_.push_back(static_cast<int32_t>(parent_.size()));
    return static_cast<int32_t>(nodes_.size()) - 1;
  }

  int32_t find(int32_t x) {
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }

  void join(int32_t a, int32_t b) {
    a = find(a), b = find(b);
    if (a != b) parent_[std::max(a, b)] = std::min(a, b);  // the oldest node leads
  }

  // Position that operand `which` of a micro-op reads for a lane.
  int32_t position(const Micro& m, int which, int32_t lane) const {
    const int32_t base = which == 0 ? m.a : which == 1 ? m.b : m.c;
    if (m.fn == kBroadcast || m.fn == kEmbed) lane = 0;
    if (m.fn == kGather) lane = static_cast<int32_t>(consts_[m.b + lane]);
    return base >= 0 ? base + lane : base - lane;
  }

  bool trace(int32_t index) {
    const Micro& m = code_.micros[index];
    const int count = operands_of(m.fn);
    sources_.emplace_back(static_cast<size_t>(m.n) * count);
    std::vector<int32_t>& from = sources_.back();  // [lane][operand]: node, or -1 for a constant
    bool uniform = m.n == 1 && m.fn != kStore;
    for (int32_t lane = 0; lane < m.n; ++lane)
      for (int w = 0; w < count; ++w) {
        const int32_t p = position(m, w, lane);
        const int32_t node = p >= 0 ? at_[p] : -1;
        from[lane * count + w] = node;
        uniform = uniform && (node < 0 || nodes_[node].uniform);
      }
    if (reduces(m.fn) && !uniform) return false;
    made_.emplace_back();
    for (int32_t lane = 0; lane < m.n; ++lane) {
      const int32_t node = add_node({index, lane, uniform});
      made_.back().push_back(node);
      if (!uniform)
        for (int w = 0; w < count; ++w) {
          const int32_t source = from[lane * count + w];
          if (source >= 0 && !nodes_[source].uniform) join(node, source);
        }
    }
    if (m.fn != kStore)
      for (int32_t lane = 0; lane < m.n; ++lane) at_[m.dst + lane] = made_.back()[lane];
    return true;
  }

  void number_fibers(Fibers* out) {
    fiber_.assign(nodes_.size(), -1);
    std::vector<std::vector<int32_t>> members;  // linear rows of each fiber
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].uniform) continue;
      const int32_t root = find(static_cast<int32_t>(i));
      if (fiber_[root] < 0) {
        fiber_[root] = static_cast<int32_t>(members.size());
        members.emplace_back();
      }
      fiber_[i] = fiber_[root];
      if (nodes_[i].micro < 0) members[fiber_[i]].push_back(nodes_[i].lane);
    }
    out->fibers = static_cast<int32_t>(members.size());
    for (const auto& m : members) out->rows = std::max(out->rows, static_cast<int32_t>(m.size()));
    out->row_of.assign(static_cast<size_t>(out->fibers) * out->rows, -1);
    register_.assign(nodes_.size(), -1);
    for (int32_t f = 0; f < out->fibers; ++f)
      for (size_t j = 0; j < members[f].size(); ++j) {
        out->row_of[static_cast<size_t>(f) * out->rows + j] = members[f][j];
        register_[members[f][j]] = static_cast<int32_t>(j);  // the node of linear row r is node r
      }
    registers_ = out->rows;
  }

  // A lane of a micro-op, ready to be joined with its neighbours into a run.
  struct Lane {
    int32_t fiber, turn;  // turn: how many lanes of this micro-op the fiber had before
    int32_t lane;
    int32_t operand[3];  // register, or ~offset in consts
  };

  void emit(Fibers* out) {
    for (size_t index = 0; index < code_.micros.size(); ++index) {
      if (nodes_[made_[index][0]].uniform)
        emit_uniform(static_cast<int32_t>(index), out);
      else
        emit_lanes(static_cast<int32_t>(index), out);
    }
    std::stable_sort(out->instrs.begin(), out->instrs.end(),
                     [](const Instr& a, const Instr& b) { return (a.fn == kLoad) > (b.fn == kLoad); });
    out->nloads = static_cast<int32_t>(
        std::count_if(out->instrs.begin(), out->instrs.end(), [](const Instr& i) { return i.fn == kLoad; }));
  }

  int32_t operand(int32_t index, int w, int32_t lane) const {
    const int32_t node = sources_[index][static_cast<size_t>(lane) * operands_of(code_.micros[index].fn) + w];
    return node >= 0 ? register_[node] : position(code_.micros[index], w, lane);
  }

  Instr start(int32_t index, int32_t lo, int32_t step, int32_t lane, const int32_t* operands) const {
    const Micro& m = code_.micros[index];
    Instr i = {m.fn, lo, lo + 1, step, 0, operands[0], operands[1], operands[2], m.imm0, m.imm1, m.imm2, 0};
    if (m.fn == kLoad) i.a = m.a, i.b = 0, i.c = lane;
    if (m.fn == kStore) i.b = m.b, i.c = m.c + lane;
    if (m.fn == kEmbed) i.b = m.b + lane, i.c = m.n;
    if (m.fn == kGather || m.fn == kBroadcast || reduces(m.fn)) i.fn = kCopy;  // of one lane
    i.operands = operands_of(i.fn);
    return i;
  }

  void emit_uniform(int32_t index, Fibers* out) {
    int32_t operands[3] = {0, 0, 0};
    for (int w = 0; w < operands_of(code_.micros[index].fn); ++w) operands[w] = operand(index, w, 0);
    Instr i = start(index, 0, 0, 0, operands);
    i.hi = out->fibers;
    i.dst = register_[made_[index][0]] = registers_++;
    out->instrs.push_back(i);
  }

  void emit_lanes(int32_t index, Fibers* out) {
    const Micro& m = code_.micros[index];
    const int count = operands_of(m.fn);
    std::map<int32_t, int32_t> turns;
    std::vector<Lane> lanes;
    int32_t most = 0;
    for (int32_t lane = 0; lane < m.n; ++lane) {
      Lane l = {fiber_[made_[index][lane]], 0, lane, {0, 0, 0}};
      l.turn = turns[l.fiber]++;
      most = std::max(most, l.turn + 1);
      for (int w = 0; w < count; ++w) l.operand[w] = operand(index, w, lane);
      lanes.push_back(l);
    }
    const int32_t first = registers_;
    if (m.fn != kStore) {
      registers_ += most;
      for (const Lane& l : lanes) register_[made_[index][l.lane]] = first + l.turn;
    }
    std::stable_sort(lanes.begin(), lanes.end(), [](const Lane& a, const Lane& b) {
      return a.turn != b.turn ? a.turn < b.turn : a.fiber < b.fiber;
    });
    for (size_t k = 0; k < lanes.size(); ++k) {
      if (k > 0 && follows(lanes[k - 1], lanes[k], count)) {
        ++out->instrs.back().hi;
        continue;
      }
      Instr i = start(index, lanes[k].fiber, 1, lanes[k].lane, lanes[k].operand);
      i.dst = first + lanes[k].turn;
      out->instrs.push_back(i);
    }
  }

  static bool follows(const Lane& a, const Lane& b, int count) {
    if (b.turn != a.turn || b.fiber != a.fiber + 1 || b.lane != a.lane + 1) return false;
    for (int w = 0; w < count; ++w)
      if (b.operand[w] != (a.operand[w] >= 0 ? a.operand[w] : a.operand[w] - 1)) return false;
    return true;
  }

  // Registers by linear scan: a register is free again after its last reader.
  void allocate(Fibers* out) {
    std::vector<int32_t> last(registers_, -1), place(registers_, -1);
    const int32_t n = static_cast<int32_t>(out->instrs.size());
    for (int32_t r = 0; r < out->rows; ++r) last[r] = out->nloads;  // loads come before the sums are in
    for (int32_t k = 0; k < n; ++k) {
      const Instr& i = out->instrs[k];
      for_operands(i, [&](int32_t x) { last[x] = std::max(last[x], k); });
      if (i.fn != kStore) last[i.dst] = std::max(last[i.dst], k);
    }
    std::vector<int32_t> busy_until(out->rows);
    for (int32_t r = 0; r < out->rows; ++r) place[r] = r, busy_until[r] = last[r];
    for (int32_t k = 0; k < n; ++k) {
      Instr& i = out->instrs[k];
      if (i.fn == kStore || place[i.dst] >= 0) continue;
      size_t free = 0;
      while (free < busy_until.size() && busy_until[free] > k) ++free;
      if (free == busy_until.size()) busy_until.push_back(0);
      place[i.dst] = static_cast<int32_t>(free);
      busy_until[free] = last[i.dst] == k ? k + 1 : last[i.dst];
    }
    for (Instr& i : out->instrs) {
      const int vectors = i.operands;
      if (vectors > 0 && i.a >= 0) i.a = place[i.a];
      if (vectors > 1 && i.b >= 0) i.b = place[i.b];
      if (vectors > 2 && i.c >= 0) i.c = place[i.c];
      if (i.fn != kStore) i.dst = place[i.dst];
    }
    out->registers = std::max<int32_t>(1, static_cast<int32_t>(busy_until.size()));
  }

  template <class F>
  static void for_operands(const Instr& i, F f) {
    const int vectors = i.operands;
    if (vectors > 0 && i.a >= 0) f(i.a);
    if (vectors > 1 && i.b >= 0) f(i.b);
    if (vectors > 2 && i.c >= 0) f(i.c);
  }

  const Code& code_;
  const float* consts_;
  std::vector<int32_t> at_;  // node at each scratch position
  std::vector<Node> nodes_;
  std::vector<int32_t> parent_, fiber_, register_;
  std::vector<std::vector<int32_t>> sources_, made_;  // by micro
  int32_t registers_ = 0;
};

}  // namespace

bool split_fibers(const Code& code, const float* consts, Fibers* out) {
  *out = Fibers{};
  return Splitter(code, consts).run(out);
}

}  // namespace fastgen::team
