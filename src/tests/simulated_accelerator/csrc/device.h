#pragma once

#include <ATen/core/Generator.h>

namespace sim {

// The CPU generator behind a device's generator; a CPU generator is returned as it is.
at::Generator cpu_generator(const at::Generator& generator);
at::Generator default_cpu_generator(c10::DeviceIndex device);

}  // namespace sim
