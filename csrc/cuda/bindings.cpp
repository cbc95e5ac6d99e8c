#include "bindings.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "../python_progress.h"
#include "../python_tables.h"
#include "../team/host_team.h"
#include "../team/ladder.h"
#include "../team/lower.h"
#include "launch.h"

namespace py = pybind11;

namespace fastgen::team {
namespace {

Precision precision_of(const std::string& name) {
  if (name == "float32") return kFloat32;
  if (name == "bfloat16") return kBfloat16;
  if (name == "float16") return kFloat16;
  throw py::value_error("precision '" + name + "': expected float32, bfloat16 or float16");
}

// The block as an array, and what the caller must know to run it.
py::tuple lower_tables(const py::dict& tables, const std::string& precision, int32_t shared_bytes) {
  const HeldProgram held = read_program(tables);
  const LowerOptions options{precision_of(precision), shared_bytes};
  std::vector<char> block;
  {
    py::gil_scoped_release release;
    block = lower(held.program, options);
  }
  const Header& h = *reinterpret_cast<const Header*>(block.data());
  py::dict info;
  info["arena"] = h.arena, info["stages"] = h.nstages, info["column_stages"] = h.ncolumn_stages;
  info["weight_bytes"] = h.bytes - h.weights;
  py::array_t<uint8_t> array(static_cast<py::ssize_t>(block.size()));
  std::memcpy(array.mutable_data(), block.data(), block.size());
  return py::make_tuple(array, info);
}

// A launch out of a dict of addresses and numbers, named like the fields of Launch; what is missing is null.
Launch read_launch(const py::dict& d) {
  const auto number = [&](const char* name) { return d.contains(name) ? d[name].cast<uint64_t>() : 0; };
  const auto address = [&]<class T>(const char* name, T** to) { *to = reinterpret_cast<T*>(number(name)); };
  Launch a = {};
  address("block", &a.block), address("arena", &a.arena), address("cond", &a.cond), address("given", &a.given);
  address("mask", &a.mask), address("out", &a.out), address("params", &a.params), address("cancel", &a.cancel);
  address("stop", &a.stop), address("control", &a.control), address("pulse", &a.pulse), address("barrier", &a.barrier),
      address("fault", &a.fault);
  a.arena_stride = static_cast<int64_t>(number("arena_stride"));
  a.slots = static_cast<int32_t>(number("slots")), a.teams = static_cast<int32_t>(number("teams"));
  a.temperature = d["temperature"].cast<float>();
  a.seed = number("seed"), a.first = number("first"), a.patience = number("patience");
  return a;
}

void run_host(const py::dict& launch, int ranks, int warps) {
  const Launch a = read_launch(launch);
  py::gil_scoped_release release;
  run_on_host(a, {ranks, warps});
}

Limits read_limits(const py::dict& d) {
  return {d["ctas"].cast<int32_t>(), d["clusters16"].cast<int32_t>(), d["clusters8"].cast<int32_t>(),
          d["cooperative"].cast<bool>()};
}

py::dict rung(const py::dict& limits, int32_t slots, const std::string& wanted) {
  const Rung r = choose_rung(read_limits(limits), slots, wanted);
  py::dict d;
  d["kind"] = static_cast<int32_t>(r.kind), d["ctas"] = r.ctas, d["teams"] = r.teams, d["text"] = describe(r);
  return d;
}

py::dict device(int index) {
  const Device i = device_info(index);
  py::dict d;
  d["name"] = i.name, d["major"] = i.major, d["minor"] = i.minor, d["multiprocessors"] = i.multiprocessors;
  d["shared_bytes"] = i.shared_bytes, d["memory"] = i.memory;
  return d;
}

py::dict limits(int index, const std::string& precision, int32_t shared_bytes) {
  const Limits l = device_limits(index, precision_of(precision), shared_bytes);
  py::dict d;
  d["ctas"] = l.ctas, d["clusters16"] = l.clusters16, d["clusters8"] = l.clusters8, d["cooperative"] = l.cooperative;
  return d;
}

// Without the GIL, which is taken for the callback and, ten times a second, to see Ctrl-C; what either raises cancels
// the run, and is raised when the kernel has ended.
int64_t run_device(const py::dict& launch, int index, uint64_t stream, uint64_t side_stream, const py::dict& r,
                   const std::string& precision, int32_t shared_bytes, const py::object& callback) {
  const Launch a = read_launch(launch);
  CudaRun how;
  how.device = index, how.stream = stream, how.side_stream = side_stream, how.precision = precision_of(precision);
  how.rung = {static_cast<TeamKind>(r["kind"].cast<int32_t>()), r["ctas"].cast<int32_t>(), r["teams"].cast<int32_t>()};
  how.shared_bytes = shared_bytes;
  PythonProgress ask(callback);
  const auto progress = [&](int64_t done) { return ask(done); };
  py::gil_scoped_release release;
  return run_on_device(a, how, progress);
}

}  // namespace

void bind(py::module_& m) {
  m.attr("has_cuda") = kHasCuda;
  m.attr("BARRIER_BYTES") = static_cast<int>(kBarrierWords * sizeof(uint32_t));
  m.attr("CONTROL_BYTES") = static_cast<int>(sizeof(Control));
  m.attr("FAULT_BYTES") = static_cast<int>(sizeof(Fault));
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  py::register_exception<Lost>(m, "LostPartner", PyExc_RuntimeError);
  py::register_exception<NeverEnded>(m, "NeverEnded", PyExc_RuntimeError);
  m.def("lower", &lower_tables, py::arg("tables"), py::arg("precision"), py::arg("shared_bytes"),
        "-> (block [bytes] uint8, {arena, stages, column_stages, weight_bytes}); see csrc/team/lowered.h.");
  m.def("run_on_host", &run_host, py::arg("launch"), py::arg("ranks"), py::arg("warps"),
        "Runs a launch on teams of host threads; addresses are of host memory.");
  m.def("choose_rung", &rung, py::arg("limits"), py::arg("slots"), py::arg("team") = "auto",
        "Which teams run a call -> {kind, ctas, teams, text}.");
  // Without CUDA these throw CudaError.
  m.def("cuda_device", &device, py::arg("device"), "Name and sizes of a device.");
  m.def("cuda_limits", &limits, py::arg("device"), py::arg("precision"), py::arg("shared_bytes"),
        "What the device holds at once of the kernel for a precision.");
  m.def("is_capturing", &is_capturing, py::arg("device"), py::arg("stream"),
        "Whether what the stream is given goes into a CUDA graph.");
  m.def("run_on_device", &run_device, py::arg("launch"), py::arg("device"), py::arg("stream"), py::arg("side_stream"),
        py::arg("rung"), py::arg("precision"), py::arg("shared_bytes"), py::arg("callback"),
        "Runs a launch on a device and waits -> steps done; addresses are of device memory.");
}

}  // namespace fastgen::team
