// The host's side. Cancelling: the host copies a word to device memory over a stream of its own; a team reads it once a
// step. Progress: a team writes a word in pinned host memory as rows are finished. The host looks at these words, and
// at the event behind the kernel, in short sleeps (wait.h).
#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "host_team.h"
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

// In pinned memory: what the teams write while they run, a one to be copied to their word for cancelling, and their
// pulses as copied.
struct Words {
  Words(Control* c, int32_t teams)
      : control(c), one(&c[teams].done), pulses(reinterpret_cast<uint32_t*>(c + teams + 1)) {
    *one = 1;
  }
  Control* control;
  uint32_t* one;
  uint32_t* pulses;
};

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

// Whether the code that the driver loaded has the cluster barrier: that of sm_90, or what it made of that one's PTX for
// a newer GPU, but not what it made of older PTX for this one.
bool has_clusters(const void* kernel) {
  cudaFuncAttributes loaded = {};
  check(cudaFuncGetAttributes(&loaded, kernel), "cudaFuncGetAttributes");
  return loaded.ptxVersion >= 90 && loaded.binaryVersion >= 90;
}

// Devices on which a kernel of this process never ended: whatever is given to them waits for it.
std::array<std::atomic<bool>, 64> given_up;

void check_given_up(int device) {
  if (given_up.at(device))
    throw CudaError("cuda:" + std::to_string(device) +
                    ": an earlier run on it never ended; this process can use the device no more, start another one");
}

// Prepares the kernel for the largest shared memory and cluster it may be launched with.
void prepare(Precision precision, int32_t shared_bytes) {
  const void* kernel = kernel_of(precision);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute(" + std::to_string(shared_bytes) + " bytes of shared memory)");
}

// What wait_for asks of a kernel that was started. The copies are from and to pinned memory, so that a copy engine does
// them: a memset may be a kernel, and wait for a multiprocessor. They are over before the copy of the fault behind
// them.
Running running(const Launch& launch, const CudaRun& how, const Words& words, const Event& end, Waiting& waiting) {
  const auto side = reinterpret_cast<cudaStream_t>(how.side_stream);
  Running kernel;
  kernel.control = words.control, kernel.pulses = words.pulses, kernel.teams = how.rung.teams;
  kernel.ended = [&] {
    const cudaError_t state = cudaEventQuery(end.get());
    if (state == cudaErrorNotReady) return false;
    waiting.done = true;
    check(state, "the sampling kernel failed (" + describe(how.rung) + ")");
    return true;
  };
  kernel.cancel = [&, side] {
    auto* cancel = const_cast<uint32_t*>(launch.cancel);
    check(cudaMemcpyAsync(cancel, words.one, sizeof *cancel, cudaMemcpyHostToDevice, side), "cudaMemcpyAsync (cancel)");
  };
  kernel.ask_pulses = [&, side] {
    check(cudaMemcpyAsync(words.pulses, launch.pulse, how.rung.teams * sizeof *words.pulses, cudaMemcpyDeviceToHost,
                          side),
          "cudaMemcpyAsync (pulses)");
  };
  kernel.pulses_arrived = [side] { return cudaStreamQuery(side) == cudaSuccess; };
  return kernel;
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
  check_given_up(device);
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
  int per_multiprocessor = 0, multiprocessors = 0, cooperative = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, shared_bytes),
        "the kernel cannot run on this device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  limits.ctas = per_multiprocessor * multiprocessors;
  limits.cooperative = cooperative != 0;
  if (has_clusters(kernel)) {
    limits.clusters8 = clusters_of(kernel, 8, shared_bytes);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess)
      limits.clusters16 = clusters_of(kernel, 16, shared_bytes);
    else
      (void)cudaGetLastError();
  }
  return limits;
}

bool is_capturing(int device, uint64_t stream) {
  const OnDevice here(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(stream), &status);
  if (error == cudaErrorStreamCaptureImplicit) {  // the default stream, which waits for one that is being captured
    (void)cudaGetLastError();
    return true;
  }
  check(error, "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

int64_t run_on_device(Launch launch, const CudaRun& how, const Progress& progress) {
  check_given_up(how.device);
  if (is_capturing(how.device, how.stream))
    throw CudaError("the stream is being captured into a CUDA graph, which cannot hold a run: the host waits for it");
  const OnDevice here(how.device);
  prepare(how.precision, how.shared_bytes);
  const auto side = reinterpret_cast<cudaStream_t>(how.side_stream);
  const Words words(launch.control, how.rung.teams);
  void* mapped = nullptr;
  check(cudaHostGetDevicePointer(&mapped, launch.control, 0), "cudaHostGetDevicePointer (control)");
  launch.control = static_cast<Control*>(mapped);
  Event end;
  start(launch, how);
  Waiting waiting(reinterpret_cast<cudaStream_t>(how.stream));
  check(cudaEventRecord(end.get(), reinterpret_cast<cudaStream_t>(how.stream)), "cudaEventRecord");
  const Running kernel = running(launch, how, words, end, waiting);
  const Waited waited = wait_for(kernel, progress, how.rhythm);
  const std::string team = describe(how.rung) + ": ";
  if (waited.end == Waited::kNeverEnded) {
    waiting.done = true;  // in vain
    given_up.at(how.device) = true;
    throw NeverEnded(team + silence_of(kernel, how.rhythm, waited) +
                     ", and the kernel did not end when it was cancelled");
  }
  Fault fault = {};
  check(cudaMemcpyAsync(&fault, launch.fault, sizeof fault, cudaMemcpyDeviceToHost, side), "cudaMemcpyAsync (fault)");
  check(cudaStreamSynchronize(side), "cudaStreamSynchronize (fault)");
  if (fault.code != kNoFault) throw Lost(message_of(fault));
  if (waited.end == Waited::kStoodStill) throw Lost(team + silence_of(kernel, how.rhythm, waited));
  if (waited.error) std::rethrow_exception(waited.error);
  return steps_done(words.control, how.rung.teams);
}

}  // namespace fastgen::team
