// Python's say while a run goes on: signals, and the caller's callback.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastgen {

class PythonProgress {
 public:
  // callback(steps done), whose False ends the run; or None.
  explicit PythonProgress(const pybind11::object& callback) : callback_(callback) {}

  // Called without the GIL, also when nothing is new: then for signals alone. Throws what a signal or the callback
  // raises.
  bool operator()(int64_t done) {
    namespace py = pybind11;
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (callback_.is_none() || done == told_) return true;
    told_ = done;
    const py::object answer = callback_(done);
    return !(py::isinstance<py::bool_>(answer) && !answer.cast<bool>());
  }

 private:
  const pybind11::object& callback_;
  int64_t told_ = 0;
};

}  // namespace fastgen
