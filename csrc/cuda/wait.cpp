#include "wait.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace fastgen::team {
namespace {

using Clock = std::chrono::steady_clock;

class Wait {
 public:
  Wait(const Running& kernel, const Progress& progress, const Rhythm& rhythm)
      : kernel_(kernel), progress_(progress), rhythm_(rhythm), seen_(2 * kernel.teams, 0) {}

  Waited run() {
    auto nap = std::chrono::microseconds(5);
    while (!kernel_.ended()) {
      report(Clock::now() - reported_at_ >= rhythm_.signals);
      if (Clock::now() - felt_at_ >= rhythm_.pulses && !feel_pulses()) {
        waited_.end = Waited::kNeverEnded;
        return waited_;
      }
      std::this_thread::sleep_for(nap);
      nap = std::min(nap * 2, std::chrono::microseconds(200));
    }
    report(false);
    return waited_;
  }

 private:
  void report(bool due) {
    const int64_t done = steps_done(kernel_.control, kernel_.teams);
    if (!progress_ || cancelled_ || (!due && done == reported_)) return;
    reported_ = done;
    try {
      if (!progress_(done)) cancel();
    } catch (...) {
      waited_.error = std::current_exception();
      cancel();
    }
    reported_at_ = Clock::now();
  }

  void cancel() {
    if (!cancelled_ && !kernel_.ended()) kernel_.cancel();
    cancelled_ = true;
  }

  // Counts, and does not time, how long nothing changed: a process that was stopped itself has missed nothing. False
  // when it has been too long.
  bool feel_pulses() {
    felt_at_ = Clock::now();
    if (!kernel_.pulses_arrived()) return true;
    bool running = false, over = true, changed = false;
    for (int32_t t = 0; t < kernel_.teams; ++t) {
      const uint32_t pulse = __atomic_load_n(kernel_.pulses + t, __ATOMIC_RELAXED);
      const uint32_t done = __atomic_load_n(&kernel_.control[t].done, __ATOMIC_RELAXED);
      running = running || (pulse != kNoPulse && pulse != kPulseOver);
      over = over && pulse == kPulseOver;
      changed = changed || pulse != seen_[2 * t] || done != seen_[2 * t + 1];
      seen_[2 * t] = pulse, seen_[2 * t + 1] = done;
    }
    kernel_.ask_pulses();
    silences_ = changed || !(running || over) ? 0 : silences_ + 1;
    if (silences_ == rhythm_.silences) {
      if (!cancelled_) waited_.end = Waited::kStoodStill;
      cancel();
    }
    return silences_ < 2 * rhythm_.silences;
  }

  const Running& kernel_;
  const Progress& progress_;
  const Rhythm& rhythm_;
  Waited waited_;
  bool cancelled_ = false;
  int64_t reported_ = 0;
  int silences_ = 0;
  std::vector<uint32_t> seen_;
  Clock::time_point reported_at_ = Clock::now(), felt_at_ = reported_at_;
};

}  // namespace

int64_t steps_done(const Control* control, int32_t teams) {
  int64_t least = INT64_MAX;
  for (int32_t t = 0; t < teams; ++t)
    least = std::min<int64_t>(least, __atomic_load_n(&control[t].done, __ATOMIC_ACQUIRE));
  return least;
}

std::string silence_of(const Running& kernel, const Rhythm& rhythm, const Waited& waited) {
  const int looks = rhythm.silences * (waited.end == Waited::kNeverEnded ? 2 : 1);
  std::string text = "no step was finished in " + std::to_string(looks * rhythm.pulses.count() / 1000) + " s";
  for (int32_t t = 0; t < kernel.teams; ++t) {
    const uint32_t pulse = kernel.pulses[t];
    if (pulse != kNoPulse && pulse != kPulseOver)
      return text + "; team " + std::to_string(t) + " is at step " + std::to_string(pulse - 1);
  }
  return text;
}

Waited wait_for(const Running& kernel, const Progress& progress, const Rhythm& rhythm) {
  return Wait(kernel, progress, rhythm).run();
}

}  // namespace fastgen::team
