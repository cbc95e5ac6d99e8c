// Running lowered programs on a CUDA device: what it can hold, the launch, and the wait. In launch.cu; where it was
// built without nvcc, in without_cuda.cpp, and then all calls throw CudaError.
#pragma once
#include <stdexcept>
#include <string>

#include "ladder.h"
#include "lowered.h"
#include "wait.h"

namespace fastgen::team {

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A kernel was given up: it still has the memory of its launch, pinned memory included, which must stay where it is.
struct NeverEnded : std::runtime_error {
  using std::runtime_error::runtime_error;
};

extern const bool kHasCuda;

struct Device {
  std::string name;
  int32_t major = 0, minor = 0, multiprocessors = 0;
  int32_t shared_bytes = 0;  // of a CTA, at most
  int64_t memory = 0;
};

// Throws CudaError: no driver, an old driver, no such device, a device older than sm_80.
Device device_info(int device);

// What the device holds at once of the kernel for a precision. Throws CudaError.
Limits device_limits(int device, Precision precision, int32_t shared_bytes);

// Whether what a stream is given goes into a CUDA graph. Throws CudaError.
bool is_capturing(int device, uint64_t stream);

struct CudaRun {
  int device = 0;
  uint64_t stream = 0;       // the caller's cudaStream_t
  uint64_t side_stream = 0;  // another one, for words to and from a running kernel
  Rung rung = {};
  Precision precision = kFloat32;
  int32_t shared_bytes = 0;
  Rhythm rhythm = {};
};

// Launches and waits for the end. The pointers of `launch` lead into device memory, that of control into pinned host
// memory, with room for 2 * teams + 1; all words are zeroed. `out` may be pinned host memory, too. When `progress` is
// called, `out` is complete for the steps done. Returns the number of steps done: all of them, or fewer if cancelled.
// Throws CudaError (at once, with nothing touched, where the stream is being captured), Lost, and what `progress`
// throws, after the kernel has ended; and NeverEnded, after which the device is refused. Allocates nothing: freeing
// device memory would wait for other samplers' kernels.
int64_t run_on_device(Launch launch, const CudaRun& how, const Progress& progress);

}  // namespace fastgen::team
