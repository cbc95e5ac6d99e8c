// Python's view of the executors: fastgen._native. Arrays in, arrays out; no torch.
#include "cuda/bindings.h"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checksum.h"
#include "cpu/executor.h"
#include "cpu/machine.h"
#include "functions.h"
#include "heads.h"
#include "plan.h"
#include "python_progress.h"
#include "python_tables.h"
#include "rng.h"
#include "validate.h"

namespace py = pybind11;
using namespace fastgen;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Floats = Array<float>;

std::string shape_of(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + ")";
}

std::unique_ptr<Executor> make_executor(const py::dict& tables, int threads, const std::string& isa) {
  const HeldProgram held = read_program(tables);
  return std::make_unique<Executor>(held.program, threads, isa);
}

template <class T>
Array<T> shaped(const py::object& value, const char* name, std::vector<py::ssize_t> shape) {
  const auto array = Array<T>::ensure(value);
  if (!array) throw py::error_already_set();
  const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
  if (got != shape) {
    std::string text;
    for (py::ssize_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
    throw py::value_error(std::string(name) + " has shape " + shape_of(array) + ", expected (" + text + ")");
  }
  return array;
}

// The conditioning arrays, checked against every Cond buffer: [slots, rows, cols, channels], or any shape of that size.
std::vector<Floats> take_conds(const Program& p, const py::sequence& given, int64_t slots) {
  const size_t expected = num_conds(p);
  if (given.size() != expected)
    throw py::value_error("got " + std::to_string(given.size()) + " cond arrays, expected " + std::to_string(expected));
  std::vector<Floats> conds;
  for (const py::handle item : given) {
    conds.push_back(Floats::ensure(item));
    if (!conds.back()) throw py::error_already_set();
  }
  for (int32_t i = 0; i < p.nbuffers; ++i) {
    const Buffer& b = p.buffers[i];
    if (b.kind != kCond) continue;
    const Floats& c = conds[b.offset];
    if (c.size() != slots * b.rows * b.cols * b.channels)
      throw py::value_error("cond " + std::to_string(b.offset) + " has shape " + shape_of(c) + ", expected (" +
                            std::to_string(slots) + ", " + std::to_string(b.rows) + ", " + std::to_string(b.cols) +
                            ", " + std::to_string(b.channels) + ")");
  }
  return conds;
}

// Runs without the GIL; takes it for the callback and to see Ctrl-C. What either raises stops the run and is raised
// here.
void run_interruptibly(Executor& executor, const RunArgs& args, const py::object& callback) {
  PythonProgress ask(callback);
  std::exception_ptr error;
  const auto progress = [&](int64_t done) {
    try {
      return ask(done);
    } catch (...) {
      error = std::current_exception();
      return false;
    }
  };
  try {
    py::gil_scoped_release release;
    executor.run(args, progress);
  } catch (const Cancelled&) {
    if (error) std::rethrow_exception(error);
    throw;
  }
}

py::tuple run(Executor& executor, int32_t slots, uint64_t seed, uint64_t first, float temperature,
              const py::sequence& cond, const py::object& given, const py::object& mask, bool want_params,
              const py::object& callback, const py::object& out) {
  const Program& p = executor.program();
  if (slots < 1) throw py::value_error("slots is " + std::to_string(slots) + ", expected at least 1");
  const std::vector<py::ssize_t> shape{slots, py::ssize_t{p.rows} * p.cols, p.head.channels};
  const std::vector<Floats> conds = take_conds(p, cond, slots);
  std::vector<const float*> cond_data;
  for (const Floats& c : conds) cond_data.push_back(c.data());
  RunArgs args = {};
  args.slots = slots, args.seed = seed, args.first = first, args.temperature = temperature;
  args.cond = cond_data.data();
  Floats known;
  Array<uint8_t> is_known;
  if (!given.is_none()) known = shaped<float>(given, "given", shape), args.given = known.data();
  if (!mask.is_none()) is_known = shaped<uint8_t>(mask, "mask", shape), args.mask = is_known.data();
  py::array_t<float> result;
  if (out.is_none()) {
    result = py::array_t<float>(shape);
  } else {
    if (!py::isinstance<py::array_t<float, py::array::c_style>>(out))
      throw py::value_error("out must be a contiguous float32 array");
    shaped<float>(out, "out", shape);
    result = py::reinterpret_borrow<py::array_t<float>>(out);
  }
  args.out = result.mutable_data();
  if (p.steps < shape[1] * p.head.phases) std::memset(args.out, 0, sizeof(float) * result.size());
  py::object params = py::none();
  if (want_params) {
    py::array_t<float> array(std::vector<py::ssize_t>{slots, p.steps, p.head.params});
    args.params = array.mutable_data();
    params = array;
  }
  run_interruptibly(executor, args, callback);
  return py::make_tuple(result, params);
}

py::array_t<float> draw(const py::array_t<Head, py::array::c_style>& head, const Floats& params,
                        const Array<double>& uniforms, float temperature) {
  if (head.size() != 1) throw py::value_error("head must be one record");
  const Head& h = *head.data();
  validate_head(h);
  const py::ssize_t n = params.ndim() == 2 ? params.shape(0) : -1;
  const py::ssize_t values = h.phases == 1 ? h.channels : 1;
  if (n < 0 || params.shape(1) != h.params)
    throw py::value_error("params has shape " + shape_of(params) + ", expected (n, " + std::to_string(h.params) + ")");
  const int count = head_uniforms(h);
  if (uniforms.ndim() != 2 || uniforms.shape(0) != n || uniforms.shape(1) != count)
    throw py::value_error("uniforms has shape " + shape_of(uniforms) + ", expected (" + std::to_string(n) + ", " +
                          std::to_string(count) + ")");
  py::array_t<float> out(std::vector<py::ssize_t>{n, values});
  for (py::ssize_t i = 0; i < n; ++i)
    head_draw(h, params.data() + i * h.params, uniforms.data() + i * count, temperature,
              out.mutable_data() + i * values);
  return out;
}

py::array_t<double> uniforms(uint64_t seed, const Array<uint64_t>& samples, uint32_t step, uint32_t count) {
  py::array_t<double> out(std::vector<py::ssize_t>{samples.size(), static_cast<py::ssize_t>(count)});
  double* u = out.mutable_data();
  for (py::ssize_t i = 0; i < samples.size(); ++i)
    for (uint32_t j = 0; j < count; ++j) *u++ = uniform(seed, samples.data()[i], step, j);
  return out;
}

py::array_t<float> map(int32_t fn, const Floats& a, const py::object& b, const py::object& c,
                       const std::vector<float>& imm, const std::string& isa) {
  const int operands = arity(fn);
  if (operands == 0) throw py::value_error("fn " + std::to_string(fn) + " is not a map or reduction");
  if (a.size() < 1 || a.size() > INT32_MAX) throw py::value_error("a is empty or too long");
  const std::vector<py::ssize_t> shape(a.shape(), a.shape() + a.ndim());
  if (imm.size() > 3) throw py::value_error("imm has more than 3 numbers");
  float m[3] = {};
  std::copy(imm.begin(), imm.end(), m);
  const Floats y = operands > 1 ? shaped<float>(b, "b", shape) : a;
  const Floats z = operands > 2 ? shaped<float>(c, "c", shape) : a;
  py::array_t<float> out(function_kind(fn) == FunctionKind::Reduce ? std::vector<py::ssize_t>{1} : shape);
  kernels_for(isa).map[fn](out.mutable_data(), a.data(), y.data(), z.data(), static_cast<int>(a.size()), m);
  return out;
}

// (name, code, operands) of every function of vector programs.
py::list functions() {
  py::list all;
#define FG_FUNCTION(kind, name, code, operands, cycles) all.append(py::make_tuple(#name, code, operands));
#include "functions.def"
#undef FG_FUNCTION
  return all;
}

py::dict dtypes() {
  py::dict d;
  d["Buffer"] = py::dtype::of<Buffer>();
  d["Tap"] = py::dtype::of<Tap>();
  d["Micro"] = py::dtype::of<Micro>();
  d["Op"] = py::dtype::of<Op>();
  d["Item"] = py::dtype::of<Item>();
  d["Head"] = py::dtype::of<Head>();
  return d;
}

py::dict machine(int threads, const std::string& isa) {
  MachineSpeed s;
  {
    py::gil_scoped_release release;
    s = measure_machine(threads, isa);
  }
  py::dict d;
  d["gflops"] = s.gflops, d["read_gbps"] = s.read_gbps, d["cached_gbps"] = s.cached_gbps;
  return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native executors of fastgen programs (csrc/plan.h).";
  PYBIND11_NUMPY_DTYPE(Buffer, channels, rows, cols, ring_rows, ring_cols, kind, offset);
  PYBIND11_NUMPY_DTYPE(Tap, buf, chan, nchan, mul_i, mul_j, div_i, div_j, off_i, off_j, lo_i, hi_i, lo_j, hi_j);
  PYBIND11_NUMPY_DTYPE(Micro, fn, dst, a, b, c, n, imm0, imm1, imm2);
  PYBIND11_NUMPY_DTYPE(Op, tap0, ntaps, acc, k, weights, bias, site_bias, partial, code0, ncode, scratch, up_i, up_j,
                       par_i, par_j, q_rows, q_cols, advance);
  PYBIND11_NUMPY_DTYPE(Item, op, q0, count, qstep);
  PYBIND11_NUMPY_DTYPE(Head, kind, channels, phases, n, levels, params, input, enc, table, delay, start,
                       floor_log_scale, clip_lo, clip_hi);
  py::register_exception<Cancelled>(m, "Cancelled", PyExc_RuntimeError);
  m.def("isas", &supported_isas, "Instruction sets this machine runs, slowest first.");
  m.def("cpu_isa", [] { return supported_isas().back(); }, "The best of isas().");
  m.def(
      "checksums",
      [](const std::vector<std::pair<uintptr_t, int64_t>>& pieces, int threads) {
        std::vector<Bytes> all;
        for (const auto& [address, bytes] : pieces) all.push_back({reinterpret_cast<const uint8_t*>(address), bytes});
        return checksums(all, threads);
      },
      py::arg("pieces"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
      "64 bits of each (address, bytes) of this process's memory: other values, or the same ones elsewhere, give "
      "others.");
  m.def("functions", &functions, "(name, code, operands) of every function of functions.def.");
  m.def("dtypes", &dtypes, "Structured dtypes of the table records, by name of the C struct.");
  m.def("draw", &draw, py::arg("head"), py::arg("params"), py::arg("uniforms"), py::arg("temperature") = 1.0f,
        "params [n, P] and uniforms [n, U] -> values [n, V].");
  m.def("uniforms", &uniforms, py::arg("seed"), py::arg("samples"), py::arg("step"), py::arg("count"),
        "The noise of one step: [len(samples), count].");
  m.def("map", &map, py::arg("fn"), py::arg("a"), py::arg("b") = py::none(), py::arg("c") = py::none(),
        py::arg("imm") = std::vector<float>{}, py::arg("isa") = "auto", "One micro-op on whole arrays.");
  m.def("machine", &machine, py::arg("threads"), py::arg("isa") = "auto",
        "Measured limits of this machine: gflops, read_gbps (memory), cached_gbps.");
  py::class_<Executor>(m, "CpuExecutor", "Runs one program on the CPU; see Program in csrc/plan.h for the tables.")
      .def(py::init(&make_executor), py::arg("tables"), py::arg("threads"), py::arg("isa") = "auto")
      .def("run", &run, py::arg("slots"), py::arg("seed"), py::arg("first") = 0, py::arg("temperature") = 1.0f,
           py::arg("cond") = py::tuple(), py::arg("given") = py::none(), py::arg("mask") = py::none(),
           py::arg("want_params") = false, py::arg("callback") = py::none(), py::arg("out") = py::none(),
           "-> (out [slots, sites, C], params [slots, steps, P] or None). callback(steps_done) -> False cancels "
           "(Cancelled); `out`, if given, is filled as the run goes and may be read in the callback.")
      .def_property_readonly("threads", &Executor::threads)
      .def_property_readonly("isa", &Executor::isa);
  team::bind(m);
}
