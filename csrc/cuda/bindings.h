// The part of fastgen._native that lowers programs and runs them on teams.
#pragma once
#include <pybind11/pybind11.h>

namespace fastgen::team {

void bind(pybind11::module_& m);

}  // namespace fastgen::team
