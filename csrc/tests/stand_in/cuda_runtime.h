// A stand-in for the part of CUDA's runtime that csrc/cuda/launch.cu uses: one device, whose kernel is a function of
// the test's on a thread. Device memory is host memory; copies happen at once, as a copy engine's may while a kernel
// runs.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureImplicit = 906
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
enum { cudaEventDisableTiming = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = struct Stream*;
using cudaEvent_t = struct Event_*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerBlockOptin, totalGlobalMem;
};

// The device, as a test sets it up and looks at it.
struct FakeDevice {
  int ptx = 90, binary = 90;
  cudaError_t capture_error = cudaSuccess;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  std::function<void(void** parameters)> launch;  // begins the kernel, which sets `ended`
  std::vector<std::string> calls;                 // those that change something
  std::atomic<bool> ended{true};
  std::atomic<cudaError_t> result{cudaSuccess};
};
inline FakeDevice fake;

inline cudaError_t called(const char* name) {
  fake.calls.emplace_back(name);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "?";
}
inline const char* cudaGetErrorString(cudaError_t) { return "as the test says"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 8, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::strcpy(p->name, "stand-in");
  p->major = 9;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return called("cudaFuncSetAttribute"); }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  a->ptxVersion = fake.ptx, a->binaryVersion = fake.binary;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return *n = 1, cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t* c) {
  return *n = c->attrs[0].val.clusterDim.x == 16 ? 7 : 15, cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = fake.capture;
  return fake.capture_error;
}
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaHostGetDevicePointer(void** to, void* from, unsigned) {
  *to = from;
  return called("cudaHostGetDevicePointer");
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return called("cudaEventCreateWithFlags"); }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return fake.ended ? fake.result.load() : cudaErrorNotReady; }
// Words of four bytes, one at a time, as the kernel reads and writes them meanwhile.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < bytes / 4; ++i) {
    const uint32_t word = __atomic_load_n(static_cast<const uint32_t*>(from) + i, __ATOMIC_RELAXED);
    __atomic_store_n(static_cast<uint32_t*>(to) + i, word, __ATOMIC_RELAXED);
  }
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void** parameters) {
  called("cudaLaunchKernelExC");
  fake.ended = false;
  fake.launch(parameters);
  return cudaSuccess;
}
