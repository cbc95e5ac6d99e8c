// Waiting for a kernel: progress, Ctrl-C, cancelling, and a kernel that stands still. The host's loop alone, without a
// call of CUDA's, so that it can be tested without a device.
//
// Why the host watches, and not the device: a cluster's barrier is the hardware's, whose wait has no limit and no form
// that could be tried again. A barrier of mbarriers in the partners' shared memory has one (try_wait), but each of 16
// CTAs would have to arrive at the 15 others, at every barrier. So a team writes a word each step (its pulse), which
// costs the barrier nothing as it waits for the stores of that stage anyway, and the host has the words copied now and
// then. It sees every kind of team, and what no barrier can see, a CTA in an endless loop. A team that has not begun is
// not missed: it waits for another kernel to make room, for as long as that takes.
#pragma once
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

#include "lowered.h"

namespace fastgen::team {

// Called with the number of steps done by all teams, at least ten times a second, also when there is nothing new, so
// that a signal is seen; false cancels.
using Progress = std::function<bool(int64_t)>;

struct Running {
  const Control* control = nullptr;  // [teams], in pinned memory
  const uint32_t* pulses = nullptr;  // [teams], in pinned memory, as they were last copied
  int32_t teams = 0;
  std::function<bool()> ended;           // throws what the kernel failed with
  std::function<void()> cancel;          // asks the teams to stop after the step they are at
  std::function<void()> ask_pulses;      // has the pulses copied once more
  std::function<bool()> pulses_arrived;  // that copy has ended
};

struct Rhythm {
  std::chrono::milliseconds signals{100};
  std::chrono::milliseconds pulses{1000};
  int silences = 30;  // after so many looks at unchanged pulses the run is cancelled; after as many again, given up
};

struct Waited {
  enum End { kEnded, kStoodStill, kNeverEnded } end = kEnded;  // kStoodStill: it ended when it was cancelled for that
  std::exception_ptr error;                                    // what `progress` threw
};

int64_t steps_done(const Control* control, int32_t teams);

// For how long a kernel was silent, and where: "no step was finished in 60 s; team 2 is at step 17".
std::string silence_of(const Running& kernel, const Rhythm& rhythm, const Waited& waited);

Waited wait_for(const Running& kernel, const Progress& progress, const Rhythm& rhythm);

}  // namespace fastgen::team
