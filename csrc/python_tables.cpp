#include "python_tables.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace fastgen {
namespace {

// The array `name` of a dict of tables, which must have exactly the type T.
template <class T>
py::array_t<T> table(const py::dict& tables, const char* name, py::list* held) {
  if (!tables.contains(name)) throw py::value_error(std::string("table '") + name + "' is missing");
  const py::object value = tables[name];
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(value))
    throw py::value_error(std::string("table '") + name + "' must be a contiguous array of dtype " +
                          std::string(py::str(py::dtype::of<T>())) + ", got " +
                          std::string(py::str(py::type::of(value))) +
                          (py::isinstance<py::array>(value) ? " of " + std::string(py::str(value.attr("dtype"))) : ""));
  held->append(value);
  return py::reinterpret_borrow<py::array_t<T>>(value);
}

int64_t number(const py::dict& tables, const char* name, int64_t most) {
  if (!tables.contains(name)) throw py::value_error(std::string("table '") + name + "' is missing");
  const py::object value = tables[name];
  int64_t n = -1;
  try {
    n = value.cast<int64_t>();
  } catch (const py::cast_error&) {  // no integer, or none of 64 bits: said below
  }
  if (n < 0 || n > most)
    throw py::value_error(std::string(name) + " is " + std::string(py::repr(value)) + ", expected 0 to " +
                          std::to_string(most));
  return n;
}

template <class T>
int32_t length(const py::array_t<T>& a, const char* name, int64_t expected = -1) {
  if (a.ndim() > 1)
    throw py::value_error(std::string("table '") + name + "' has " + std::to_string(a.ndim()) + " axes, expected 1");
  if (a.size() > INT32_MAX || (expected >= 0 && a.size() != expected))
    throw py::value_error(std::string("table '") + name + "' has " + std::to_string(a.size()) + " records, expected " +
                          (expected >= 0 ? std::to_string(expected) : "fewer than 2^31"));
  return static_cast<int32_t>(a.size());
}

}  // namespace

HeldProgram read_program(const py::dict& t) {
  HeldProgram held;
  Program& p = held.program;
  p.rows = number(t, "rows", INT32_MAX), p.cols = number(t, "cols", INT32_MAX);
  p.steps = number(t, "steps", INT64_MAX), p.arena = number(t, "arena", INT64_MAX);
  p.row_len = number(t, "row_len", INT32_MAX), p.period = number(t, "period", INT32_MAX - 1);
  if (p.row_len < 1 || p.period % p.row_len != 0)
    throw py::value_error("row_len " + std::to_string(p.row_len) + " does not divide period " +
                          std::to_string(p.period));
  const auto buffers = table<Buffer>(t, "buffers", &held.arrays);
  const auto taps = table<Tap>(t, "taps", &held.arrays);
  const auto code = table<Micro>(t, "code", &held.arrays);
  const auto ops = table<Op>(t, "ops", &held.arrays);
  const auto row_items = table<Item>(t, "row_items", &held.arrays),
             step_items = table<Item>(t, "step_items", &held.arrays);
  const auto row_ptr = table<int32_t>(t, "row_ptr", &held.arrays),
             step_ptr = table<int32_t>(t, "step_ptr", &held.arrays);
  const auto step_site = table<int32_t>(t, "step_site", &held.arrays),
             step_phase = table<int32_t>(t, "step_phase", &held.arrays),
             param_ptr = table<int32_t>(t, "param_ptr", &held.arrays);
  const auto consts = table<float>(t, "consts", &held.arrays);
  const auto head = table<Head>(t, "head", &held.arrays);
  p.buffers = buffers.data(), p.nbuffers = length(buffers, "buffers");
  p.taps = taps.data(), p.ntaps = length(taps, "taps");
  p.code = code.data(), p.ncode = length(code, "code");
  p.ops = ops.data(), p.nops = length(ops, "ops");
  length(row_ptr, "row_ptr", p.period / p.row_len + 1);
  length(step_ptr, "step_ptr", int64_t{p.period} + 1);
  length(step_site, "step_site", p.period);
  length(step_phase, "step_phase", p.period);
  length(row_items, "row_items", row_ptr.data()[row_ptr.size() - 1]);
  length(step_items, "step_items", step_ptr.data()[step_ptr.size() - 1]);
  length(head, "head", 1);
  length(param_ptr, "param_ptr", int64_t{std::max(head.data()->phases, 0)} + 1);
  p.row_items = row_items.data(), p.row_ptr = row_ptr.data();
  p.step_items = step_items.data(), p.step_ptr = step_ptr.data();
  p.step_site = step_site.data(), p.step_phase = step_phase.data(), p.param_ptr = param_ptr.data();
  p.consts = consts.data(), p.nconsts = consts.size();
  p.head = *head.data();
  py::array weights;
  if (t.contains("weights") && py::isinstance<py::array_t<uint16_t, py::array::c_style>>(t["weights"]))
    weights = table<uint16_t>(t, "weights", &held.arrays), p.weight_bits = 16;
  else
    weights = table<float>(t, "weights", &held.arrays), p.weight_bits = 32;
  p.weights = weights.data(), p.nweights = weights.size();
  return held;
}

}  // namespace fastgen
