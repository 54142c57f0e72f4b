// What products of float32 and bfloat16 share, whatever multiplies.

#pragma once

#include "cpu_panels.h"

namespace {

typedef uint32_t __attribute__((may_alias)) Unit;

struct Matrix {
  int64_t inputs, depth, outputs, panels;
};

}  // namespace
