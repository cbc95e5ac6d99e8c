#include "host_team.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "interpreter.h"

namespace fastgen::team {
namespace {

// Counts arrivals; everybody leaves when all have come, or when somebody has waited too long.
class Meeting {
 public:
  Meeting(int members, uint64_t patience) : members_(members), patience_(patience) {}

  bool wait() {
    const uint64_t mine = arrived_.fetch_add(1, std::memory_order_acq_rel);
    const uint64_t goal = (mine / members_ + 1) * members_;
    const auto deadline = std::chrono::steady_clock::now() + patience_;
    while (arrived_.load(std::memory_order_acquire) < goal) {
      if (given_up_.load(std::memory_order_acquire)) return false;
      if (std::chrono::steady_clock::now() > deadline) {
        given_up_.store(true, std::memory_order_release);
        return false;
      }
      std::this_thread::yield();
    }
    return !given_up_.load(std::memory_order_acquire);
  }

 private:
  const uint64_t members_;
  const std::chrono::nanoseconds patience_;
  std::atomic<uint64_t> arrived_{0};
  std::atomic<bool> given_up_{false};
};

class HostTeam {
 public:
  HostTeam(int index, int rank, int warp, const HostRun& how, Meeting& all, Meeting& cta, std::vector<char>& shared)
      : index_(index), rank_(rank), warp_(warp), how_(how), all_(all), cta_(cta), shared_(shared) {}

  int index() const { return index_; }
  int rank() const { return rank_; }
  int size() const { return how_.ranks; }
  int warp() const { return warp_; }
  int warps() const { return how_.warps; }
  int lane() const { return 0; }
  void at(int64_t step, int32_t op) { step_ = step, op_ = op; }
  Fault fault() const { return {kLostPartner, index_, rank_, op_, step_}; }
  char* shared() const { return shared_.data(); }
  void sync_warp() const {}
  void sync_cta() {
    if (!cta_.wait()) lost_ = true;
  }
  bool sync() { return all_.wait() && !lost_; }

  uint32_t peek(const uint32_t* word) const { return __atomic_load_n(word, __ATOMIC_RELAXED); }
  void post(uint32_t* word, uint32_t value) const { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
  void post_to_host(uint32_t* word, uint32_t value) const { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

 private:
  const int index_, rank_, warp_;
  const HostRun& how_;
  Meeting& all_;
  Meeting& cta_;
  std::vector<char>& shared_;
  int64_t step_ = 0;
  int32_t op_ = -1;
  bool lost_ = false;
};

void interpret(HostTeam& team, const Launch& launch) {
  switch (reinterpret_cast<const Header*>(launch.block)->precision) {
    case kFloat32: return Interpreter<kFloat32, HostTeam>(team, launch).run();
    case kBfloat16: return Interpreter<kBfloat16, HostTeam>(team, launch).run();
    default: return Interpreter<kFloat16, HostTeam>(team, launch).run();
  }
}

void run_team(int index, const Launch& launch, const HostRun& how) {
  const Header& h = *reinterpret_cast<const Header*>(launch.block);
  Meeting all(how.ranks * how.warps, how.patience);
  std::vector<std::unique_ptr<Meeting>> ctas;
  std::vector<std::vector<char>> shared(how.ranks);
  for (int r = 0; r < how.ranks; ++r) {
    ctas.push_back(std::make_unique<Meeting>(how.warps, how.patience));
    shared[r].resize(h.shared_bytes);
  }
  std::vector<Fault> faults(how.ranks * how.warps);
  std::vector<std::thread> threads;
  for (int r = 0; r < how.ranks; ++r)
    for (int w = 0; w < how.warps; ++w)
      threads.emplace_back([&, r, w] {
        if (r == how.lost) return;
        HostTeam team(index, r, w, how, all, *ctas[r], shared[r]);
        interpret(team, launch);
        const Fault where = team.fault();
        if (!team.sync()) faults[r * how.warps + w] = where;
      });
  for (std::thread& t : threads) t.join();
  for (const Fault& f : faults)
    if (f.code != kNoFault) throw Lost(message_of(f));
}

}  // namespace

std::string message_of(const Fault& f) {
  return "team " + std::to_string(f.team) + ", CTA " + std::to_string(f.rank) +
         ": a partner did not come to the barrier " +
         (f.op < 0 ? "around the draw" : "before op " + std::to_string(f.op)) + " of step " + std::to_string(f.step);
}

void run_on_host(Launch launch, const HostRun& how) {
  std::vector<uint32_t> stop(launch.teams, 0), barrier(launch.teams * 32, 0);
  std::vector<Control> control(launch.teams);
  Fault fault = {};
  const uint32_t never = 0;
  launch.stop = stop.data(), launch.barrier = barrier.data(), launch.fault = &fault;
  if (!launch.control) launch.control = control.data();
  if (!launch.cancel) launch.cancel = &never;
  for (int t = 0; t < launch.teams; ++t) run_team(t, launch, how);
}

}  // namespace fastgen::team
