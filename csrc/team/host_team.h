// Teams of host threads: the interpreter without a GPU. A thread is a warp; so both the barriers inside a CTA and those
// between CTAs are real ones, and a sanitizer sees every race that the GPU would have, except those inside a warp.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "lowered.h"

namespace fastgen::team {

struct HostRun {
  int ranks = 1;                    // CTAs of a team
  int warps = 1;                    // threads of a CTA
  int lost = -1;                    // a CTA that never comes to its first barrier: to see that this ends
  uint64_t patience = 20000000000;  // nanoseconds
};

// What a fault says to a person.
std::string message_of(const Fault& fault);

struct Lost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs the teams of a launch, one after another. The pointers of `launch` lead into host memory; stop, barrier and
// fault are made here, and control and cancel where they are null. Throws Lost.
void run_on_host(Launch launch, const HostRun& how);

}  // namespace fastgen::team
