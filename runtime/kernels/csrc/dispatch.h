// Which instruction sets were compiled and can run here.
#pragma once

#include "common.h"

namespace fx {

// Whether kernels of that set were compiled into this library and this CPU and operating system run them.
bool can_run(int isa);

}  // namespace fx
