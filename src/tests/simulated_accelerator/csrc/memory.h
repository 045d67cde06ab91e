// The memory of the simulated devices: what is handed out, counted and refused.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <cstdint>

namespace sim {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kMaxDevices = 8;

// Device addresses carry a bit that no host address has. Host code that dereferences one by accident faults, as it
// would with the address of a real device; only the kernels of this extension take the bit off.
constexpr uintptr_t kDeviceBit = uintptr_t{1} << 62;

inline void* to_device_address(void* host) {
  return host ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | kDeviceBit) : nullptr;
}

inline void* to_host_address(const void* device) {
  return device ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(device) & ~kDeviceBit) : nullptr;
}

// False until a test asks for the device: there are then no devices, and nothing can be allocated.
bool enabled();
// Number of devices while enabled, and while disabled too.
c10::DeviceIndex configured_devices();
// The calling thread's current device.
c10::DeviceIndex current_device();
// Makes `index` the calling thread's current device and returns the one before; raises for a device there is not.
c10::DeviceIndex exchange_device(c10::DeviceIndex index);
void unchecked_set_device(c10::DeviceIndex index) noexcept;

// Allocates on the current device. Freed bytes are available at once: nothing is cached or rounded.
c10::Allocator* device_allocator();
// Page-locked memory, as far as anyone can tell from outside: host memory whose addresses `is_pinned` knows.
c10::Allocator* pinned_allocator();
bool is_pinned(const void* address);

}  // namespace sim
