// The host's side. Cancelling: the host copies a word to device memory over a stream of its own; a team reads it once a
// step. Progress: a team writes a word in pinned host memory as rows are finished. The host looks at these words, and
// at the event behind the kernel, in short sleeps.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>

#include "../team/host_team.h"
#include "kernels.h"
#include "launch.h"

namespace fastgen::team {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // not to be found by the next call
  throw CudaError(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// The device of the calling thread, put back at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;  // setting one that was never used would open it
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Waits for what a stream was given, whatever happens: its kernel works on the caller's memory.
class Waiting {
 public:
  explicit Waiting(cudaStream_t stream) : stream_(stream) {}
  ~Waiting() {
    if (!done) (void)cudaStreamSynchronize(stream_);
  }
  bool done = false;

 private:
  const cudaStream_t stream_;
};

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

int64_t steps_done(const Control* control, int32_t teams) {
  int64_t least = INT64_MAX;
  for (int32_t t = 0; t < teams; ++t)
    least = std::min<int64_t>(least, static_cast<const volatile Control*>(control)[t].done);
  return least;
}

void start(Launch& launch, const CudaRun& how) {
  TeamKind kind = how.rung.kind;
  int ctas = how.rung.ctas;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas * how.rung.teams);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attribute = {};
  if (kind == kClusterTeam) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
    config.numAttrs = 1;
  } else if (kind == kGridTeam) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  config.attrs = &attribute;
  void* parameters[] = {&launch, &kind, &ctas};
  check(cudaLaunchKernelExC(&config, kernel_of(how.precision), parameters),
        "launch of " + describe(how.rung) + " with " + std::to_string(how.shared_bytes) + " bytes of shared memory");
}

// Prepares the kernel for the largest shared memory and cluster it may be launched with.
void prepare(Precision precision, int32_t shared_bytes) {
  const void* kernel = kernel_of(precision);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute(" + std::to_string(shared_bytes) + " bytes of shared memory)");
}

int32_t clusters_of(const void* kernel, int32_t ctas, int32_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
  config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace

const bool kHasCuda = true;

Device device_info(int device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no CUDA device can be used");
  if (device < 0 || device >= count)
    throw CudaError("cuda:" + std::to_string(device) + ": this machine has " + std::to_string(count) + " CUDA devices");
  cudaDeviceProp p = {};
  check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  Device d;
  d.name = p.name, d.major = p.major, d.minor = p.minor, d.multiprocessors = p.multiProcessorCount;
  d.shared_bytes = static_cast<int32_t>(p.sharedMemPerBlockOptin), d.memory = static_cast<int64_t>(p.totalGlobalMem);
  if (p.major < 8)
    throw CudaError("cuda:" + std::to_string(device) + " is a " + d.name + " (sm_" + std::to_string(p.major) +
                    std::to_string(p.minor) + "); the executor needs sm_80 or newer");
  return d;
}

Limits device_limits(int device, Precision precision, int32_t shared_bytes) {
  const OnDevice here(device);
  prepare(precision, shared_bytes);
  const void* kernel = kernel_of(precision);
  Limits limits;
  int per_multiprocessor = 0, multiprocessors = 0, major = 0, cooperative = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, shared_bytes),
        "the kernel cannot run on this device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  limits.ctas = per_multiprocessor * multiprocessors;
  limits.cooperative = cooperative != 0;
  if (major == 9) {  // the cluster barrier is compiled for sm_90a alone
    limits.clusters8 = clusters_of(kernel, 8, shared_bytes);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess)
      limits.clusters16 = clusters_of(kernel, 16, shared_bytes);
    else
      (void)cudaGetLastError();
  }
  return limits;
}

int64_t run_on_device(Launch launch, const CudaRun& how, const Progress& progress) {
  const OnDevice here(how.device);
  prepare(how.precision, how.shared_bytes);
  const auto stream = reinterpret_cast<cudaStream_t>(how.stream),
             side = reinterpret_cast<cudaStream_t>(how.side_stream);
  const Control* control = launch.control;
  Control* one = launch.control + how.rung.teams;  // behind those of the teams
  one->done = 1;
  void* mapped = nullptr;
  check(cudaHostGetDevicePointer(&mapped, launch.control, 0), "cudaHostGetDevicePointer (control)");
  launch.control = static_cast<Control*>(mapped);
  const Event end;
  start(launch, how);
  Waiting waiting(stream);
  check(cudaEventRecord(end.get(), stream), "cudaEventRecord");
  int64_t reported = 0;
  std::exception_ptr error;
  bool cancelled = false;
  const auto report = [&] {
    const int64_t done = steps_done(control, how.rung.teams);
    if (!progress || cancelled || done == reported) return;
    reported = done;
    try {
      cancelled = !progress(done);
    } catch (...) {
      error = std::current_exception();
      cancelled = true;
    }
  };
  // From pinned memory, so a copy engine does it: a memset may be a kernel, and wait for a multiprocessor. It is over
  // before the copy of the fault behind it is.
  const auto cancel = [&] {
    check(cudaMemcpyAsync(const_cast<uint32_t*>(launch.cancel), &one->done, sizeof one->done, cudaMemcpyHostToDevice,
                          side),
          "cudaMemcpyAsync (cancel)");
  };
  cudaError_t state;
  auto nap = std::chrono::microseconds(5);
  while ((state = cudaEventQuery(end.get())) == cudaErrorNotReady) {
    const bool before = cancelled;
    report();
    if (cancelled && !before) cancel();
    std::this_thread::sleep_for(nap);
    nap = std::min(nap * 2, std::chrono::microseconds(200));
  }
  waiting.done = true;
  check(state, "the sampling kernel failed (" + describe(how.rung) + ")");
  Fault fault = {};
  check(cudaMemcpyAsync(&fault, launch.fault, sizeof fault, cudaMemcpyDeviceToHost, side), "cudaMemcpyAsync (fault)");
  check(cudaStreamSynchronize(side), "cudaStreamSynchronize (fault)");
  if (fault.code != kNoFault) throw Lost(message_of(fault));
  report();
  if (error) std::rethrow_exception(error);
  return steps_done(control, how.rung.teams);
}

}  // namespace fastgen::team
