// A program out of numpy tables (fastgen.plan.table): what every executor's binding begins with.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "plan.h"

namespace fastgen {

// A program and the arrays its pointers lead into.
struct HeldProgram {
  Program program = {};
  pybind11::list arrays;
};

// Checks dtypes and lengths of the tables; what they say is validate()'s concern. Throws pybind11::value_error naming
// the table.
HeldProgram read_program(const pybind11::dict& tables);

}  // namespace fastgen
