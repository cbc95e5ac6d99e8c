// The launcher on a stand-in for CUDA's runtime: looking for signals, cancelling, a kernel that stands still or never
// ends, a stream that is being captured, and which code has clusters.
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../cuda/launch.cu"  // as host code, which it is
#include "check.h"

using namespace fastgen::team;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

const void* fastgen::team::kernel_of(Precision) { return nullptr; }

namespace {

constexpr int kTeams = 3;

// The memory of a launch, and a kernel on a thread: teams that step, each `pace` apart, until they are cancelled.
struct Run {
  std::vector<Control> control = std::vector<Control>(2 * kTeams + 1);
  std::vector<uint32_t> pulse = std::vector<uint32_t>(kTeams), barrier = std::vector<uint32_t>(kTeams * kBarrierWords);
  uint32_t cancel = 0;
  Fault fault = {};
  CudaRun how;
  std::thread kernel;

  Run() {
    how.rung = {kClusterTeam, 16, kTeams};
    how.rhythm = {20ms, 10ms, 10};
  }
  ~Run() {
    if (kernel.joinable()) kernel.join();
  }

  Launch launch() {
    Launch a = {};
    a.control = control.data(), a.pulse = pulse.data(), a.barrier = barrier.data(), a.cancel = &cancel,
    a.fault = &fault;
    a.teams = kTeams;
    return a;
  }

  // body(launch, team) is what one team does; false: it leaves early.
  template <class F>
  void kernel_is(F body) {
    fake.result = cudaSuccess;
    fake.launch = [this, body](void** parameters) {
      kernel = std::thread([body, a = *static_cast<Launch*>(parameters[0])] {
        for (int t = 0; t < kTeams; ++t) body(a, t);
        fake.ended = true;
      });
    };
  }

  int64_t run(const Progress& progress = {}) { return run_on_device(launch(), how, progress); }
};

bool cancelled(const Launch& a) { return __atomic_load_n(a.cancel, __ATOMIC_RELAXED) != 0; }
void beat(const Launch& a, int team, uint32_t pulse) { __atomic_store_n(a.pulse + team, pulse, __ATOMIC_RELAXED); }
void finish(const Launch& a, int team, uint32_t steps) {
  __atomic_store_n(&a.control[team].done, steps, __ATOMIC_RELEASE);
  beat(a, team, kPulseOver);
}

template <class E, class F>
std::string thrown(F f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void a_run_ends() {
  Run r;
  r.kernel_is([](const Launch& a, int t) { finish(a, t, 7); });
  int64_t told = 0;
  CHECK(r.run([&](int64_t done) { return told = done, true; }) == 7, "steps");
  CHECK(told == 7, "the last step was not told: %d", int(told));
}

// Nothing is told by the kernel for 0.4 s: a signal is seen all the same, in ten looks or more.
void signals_are_looked_for() {
  Run r;
  r.how.rhythm = Rhythm();
  r.how.rhythm.signals = 40ms;
  r.kernel_is([](const Launch& a, int t) {
    if (t == 0) std::this_thread::sleep_for(400ms);
    finish(a, t, 1);
  });
  int looks = 0;
  r.run([&](int64_t done) { return looks += done == 0, true; });
  CHECK(looks >= 3 && looks <= 10, "%d looks", looks);
  CHECK(Rhythm().signals <= 100ms, "the default is slower than ten a second");
}

// Ctrl-C without a callback: what the look throws cancels, and is thrown when the kernel has ended.
void a_signal_cancels() {
  Run r;
  r.how.rhythm.silences = 1 << 20;
  r.kernel_is([](const Launch& a, int t) {
    for (const auto end = Clock::now() + 20s; t == 0 && !cancelled(a) && Clock::now() < end;)
      std::this_thread::sleep_for(1ms);
    finish(a, t, 3);
  });
  const auto began = Clock::now();
  const std::string error =
      thrown<std::domain_error>([&] { r.run([](int64_t) -> bool { throw std::domain_error("Ctrl-C"); }); });
  CHECK(error == "Ctrl-C", "%s", error.c_str());
  CHECK(fake.ended && Clock::now() - began < 10s, "it did not wait for the kernel, or the kernel was not cancelled");
}

// One team stands at step 4 until it is cancelled: ended, and said.
void a_kernel_that_stands_still_is_ended() {
  Run r;
  r.kernel_is([](const Launch& a, int t) {
    beat(a, t, 5);
    while (t == 1 && !cancelled(a)) std::this_thread::sleep_for(1ms);
    finish(a, t, t == 1 ? 4 : 9);
  });
  const std::string error = thrown<Lost>([&] { r.run(); });
  CHECK(has(error, "3 clusters of 16 CTAs: no step was finished in") && has(error, "team 1 is at step 4"), "%s",
        error.c_str());
}

// It is slow, but every team's pulse beats; or it waits for another kernel to make room, and has none yet.
void a_slow_kernel_is_left_alone() {
  for (const bool begun : {true, false}) {
    Run r;
    r.kernel_is([begun](const Launch& a, int t) {
      for (uint32_t step = 0; t == 0 && step < 12; ++step) {  // twice as long as a silence may last
        if (begun) beat(a, t, step + 1);
        std::this_thread::sleep_for(40ms);
      }
      finish(a, t, 9);
    });
    CHECK(r.run() == 9, "begun: %d", begun);
  }
}

// A team at its first step, or a CTA of teams that have left otherwise. The device is refused from then on, others are
// not; and nobody waits for the kernel.
void a_kernel_that_never_ends_is_given_up() {
  for (const uint32_t pulse : {uint32_t{1}, kPulseOver}) {
    Run r;
    r.how.device = pulse == 1 ? 5 : 6;
    std::atomic<bool> leave{false};
    r.kernel_is([&](const Launch& a, int t) {
      for (int other = t; other < kTeams; ++other) beat(a, other, pulse);
      for (const auto end = Clock::now() + 20s; !leave && Clock::now() < end;) std::this_thread::sleep_for(1ms);
    });
    const std::string error = thrown<NeverEnded>([&] { r.run(); });
    CHECK(has(error, pulse == 1 ? "team 0 is at step 0, and" : " s, and the kernel did not end"), "%s", error.c_str());
    const std::string cuda = "cuda:" + std::to_string(r.how.device) + ": an earlier run on it never ended";
    CHECK(has(thrown<CudaError>([&] { r.run(); }), cuda.c_str()), "run");
    CHECK(has(thrown<CudaError>([&] { device_info(r.how.device); }), cuda.c_str()), "device_info");
    CHECK(device_info(4).name == "stand-in", "another device");
    leave = true;
  }
}

void failures_are_named() {
  Run r;
  r.kernel_is([](const Launch&, int) { fake.result = cudaErrorLaunchFailure; });
  const std::string error = thrown<CudaError>([&] { r.run(); });
  CHECK(has(error, "the sampling kernel failed (3 clusters of 16 CTAs): cudaErrorLaunchFailure"), "%s", error.c_str());
  Run lost;
  lost.kernel_is([](const Launch& a, int t) {
    if (t == 0) *a.fault = {kLostPartner, 2, 7, 11, 40};
    beat(a, t, kPulseOver);
  });
  const std::string where = thrown<Lost>([&] { lost.run(); });
  CHECK(has(where, "team 2, CTA 7") && has(where, "before op 11 of step 40"), "%s", where.c_str());
}

void a_captured_stream_is_refused_untouched() {
  for (const bool implicit : {false, true}) {
    Run r;
    if (implicit)
      fake.capture_error = cudaErrorStreamCaptureImplicit;
    else
      fake.capture = cudaStreamCaptureStatusActive;
    fake.calls.clear();
    const std::string error = thrown<CudaError>([&] { r.run(); });
    CHECK(has(error, "the stream is being captured into a CUDA graph"), "%s", error.c_str());
    CHECK(fake.calls.empty(), "touched: %s", fake.calls.empty() ? "" : fake.calls[0].c_str());
    fake.capture = cudaStreamCaptureStatusNone, fake.capture_error = cudaSuccess;
    CHECK(!is_capturing(0, 0), "it ended");
  }
}

void clusters_are_where_their_code_is() {
  struct {
    int ptx, binary;
    bool clusters;
    const char* what;
  } loaded[] = {{80, 80, false, "Ampere"},
                {80, 90, false, "Ampere's PTX on Hopper"},
                {90, 90, true, "Hopper"},
                {90, 120, true, "Hopper's PTX on Blackwell"}};
  for (const auto& l : loaded) {
    fake.ptx = l.ptx, fake.binary = l.binary;
    const Limits limits = device_limits(0, kFloat32, 1024);
    CHECK(limits.clusters16 == (l.clusters ? 7 : 0) && limits.clusters8 == (l.clusters ? 15 : 0), "%s", l.what);
  }
}

}  // namespace

int main() {
  a_run_ends();
  signals_are_looked_for();
  a_signal_cancels();
  a_kernel_that_stands_still_is_ended();
  a_slow_kernel_is_left_alone();
  a_kernel_that_never_ends_is_given_up();
  failures_are_named();
  a_captured_stream_is_refused_untouched();
  clusters_are_where_their_code_is();
  return report("test_launch");
}
