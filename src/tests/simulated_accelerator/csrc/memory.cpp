#include "memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace sim {
namespace {

using c10::CachingAllocator::StatType;
using c10::CachingDeviceAllocator::DeviceStats;

// An armed failure counts allocations down and refuses the one that reaches zero, or all from there on.
struct Failure {
  bool armed = false;
  bool persistent = false;
  int64_t countdown = 0;

  bool strikes() {
    if (!armed || --countdown > 0) {
      return false;
    }
    armed = persistent;
    return true;
  }
};

// All in bytes, except the counters of events.
struct Ledger {
  int64_t cap = 0;
  int64_t used = 0;
  int64_t peak = 0;
  int64_t occupied = 0;  // taken by "another process": not free, yet not ours
  int64_t allocations = 0;  // attempts, refused ones included
  int64_t frees = 0;
  int64_t refusals = 0;
  int64_t injected = 0;  // refusals for which a Failure is the reason
  Failure failure;

  int64_t free_bytes() const { return std::max<int64_t>(0, cap - used - occupied); }
};

std::mutex ledgers_mutex;
std::array<Ledger, kMaxDevices> ledgers;
Failure failure_anywhere;
std::atomic<bool> is_enabled{false};
std::atomic<int> device_total{2};
thread_local c10::DeviceIndex thread_device = 0;

// Stands in the 64 bytes before every block: that keeps the data on a cache line of its own.
struct alignas(64) Header {
  size_t bytes;
  c10::DeviceIndex device;
};

void* allocate_host(size_t bytes, c10::DeviceIndex device) {
  const size_t padded = (bytes + 2 * sizeof(Header) - 1) / sizeof(Header) * sizeof(Header);
  auto* header = static_cast<Header*>(std::aligned_alloc(alignof(Header), padded));
  TORCH_CHECK(header, "the host has no ", bytes, " bytes left for the simulated accelerator");
  *header = Header{bytes, device};
  return header + 1;
}

Header* header_of(void* host) {
  return static_cast<Header*>(host) - 1;
}

[[noreturn]] void refuse(const Ledger& ledger, c10::DeviceIndex device, size_t bytes, bool injected) {
  TORCH_CHECK_WITH(
      OutOfMemoryError, false,
      "SIM out of memory. Tried to allocate ", bytes, " bytes. Device ", static_cast<int>(device),
      " has a total capacity of ", ledger.cap, " bytes of which ", ledger.free_bytes(), " bytes are free. ",
      ledger.used, " bytes are in use by this process", injected ? " (injected failure)." : ".");
}

void charge(c10::DeviceIndex device, size_t bytes) {
  std::lock_guard lock(ledgers_mutex);
  auto& ledger = ledgers[device];
  ++ledger.allocations;
  const bool here = ledger.failure.strikes();
  const bool anywhere = failure_anywhere.strikes();
  const bool injected = here || anywhere;
  if (injected || static_cast<int64_t>(bytes) > ledger.free_bytes()) {
    ++ledger.refusals;
    ledger.injected += injected;
    refuse(ledger, device, bytes, injected);
  }
  ledger.used += static_cast<int64_t>(bytes);
  ledger.peak = std::max(ledger.peak, ledger.used);
}

void release(void* address) {
  if (!address) {
    return;
  }
  auto* header = header_of(to_host_address(address));
  {
    std::lock_guard lock(ledgers_mutex);
    ledgers[header->device].used -= static_cast<int64_t>(header->bytes);
    ++ledgers[header->device].frees;
  }
  std::free(header);
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(enabled(), "the simulated accelerator is switched off: a test asks for it with the `sim` fixture");
    const auto device = current_device();
    if (bytes == 0) {
      return {nullptr, nullptr, &release, c10::Device(kType, device)};
    }
    charge(device, bytes);
    void* host = allocate_host(bytes, device);
    // Not-a-number in every float type: memory that was read before it was written shows.
    std::memset(host, 0xFF, bytes);
    void* address = to_device_address(host);
    return {address, address, &release, c10::Device(kType, device)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(to_host_address(target), to_host_address(source), bytes);
  }

  bool initialized() override { return enabled(); }
  void emptyCache(c10::MempoolId_t /*pool*/) override {}
  void recordStream(const c10::DataPtr& /*data*/, c10::Stream /*stream*/) override {}

  DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard lock(ledgers_mutex);
    const auto& ledger = ledgers.at(device);
    constexpr auto all = static_cast<size_t>(StatType::AGGREGATE);
    DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*bytes)[all].current = ledger.used;
      (*bytes)[all].peak = ledger.peak;
    }
    stats.allocation[all].current = ledger.allocations - ledger.refusals - ledger.frees;
    stats.allocation[all].allocated = ledger.allocations - ledger.refusals;
    stats.allocation[all].freed = ledger.frees;
    stats.num_ooms = ledger.refusals;
    return stats;
  }

  void resetAccumulatedStats(c10::DeviceIndex /*device*/) override {}

  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard lock(ledgers_mutex);
    ledgers.at(device).peak = ledgers.at(device).used;
  }

  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard lock(ledgers_mutex);
    return {ledgers.at(device).free_bytes(), ledgers.at(device).cap};
  }
};

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned_blocks;

void release_pinned(void* host) {
  if (!host) {
    return;
  }
  {
    std::lock_guard lock(pinned_mutex);
    pinned_blocks.erase(reinterpret_cast<uintptr_t>(host));
  }
  std::free(header_of(host));
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release_pinned, c10::Device(c10::DeviceType::CPU)};
    }
    void* host = allocate_host(bytes, -1);
    std::lock_guard lock(pinned_mutex);
    pinned_blocks[reinterpret_cast<uintptr_t>(host)] = bytes;
    return {host, host, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    std::memcpy(target, source, bytes);
  }
};

DeviceAllocator the_device_allocator;
PinnedAllocator the_pinned_allocator;

void check_device(int device) {
  TORCH_CHECK(device >= 0 && device < device_total, "there is no simulated device ", device, ": there are ",
              device_total.load());
}

}  // namespace

bool enabled() {
  return is_enabled;
}

c10::DeviceIndex configured_devices() {
  return static_cast<c10::DeviceIndex>(device_total.load());
}

c10::DeviceIndex current_device() {
  return thread_device;
}

c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  check_device(index);
  return std::exchange(thread_device, index);
}

void unchecked_set_device(c10::DeviceIndex index) noexcept {
  thread_device = index;
}

c10::Allocator* device_allocator() {
  return &the_device_allocator;
}

c10::Allocator* pinned_allocator() {
  return &the_pinned_allocator;
}

bool is_pinned(const void* address) {
  std::lock_guard lock(pinned_mutex);
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  auto after = pinned_blocks.upper_bound(wanted);
  if (after == pinned_blocks.begin()) {
    return false;
  }
  const auto& [start, bytes] = *std::prev(after);
  return wanted < start + bytes;
}

REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &the_device_allocator)

}  // namespace sim

// What the tests drive, through ctypes. Devices are checked on the Python side.
#define SIM_API __attribute__((visibility("default")))

extern "C" {

enum SimField { kUsed, kPeak, kCap, kOccupied, kAllocations, kRefusals, kInjected };

SIM_API int64_t sim_read(int device, int field) {
  std::lock_guard lock(sim::ledgers_mutex);
  const auto& ledger = sim::ledgers[device];
  switch (field) {
    case kUsed: return ledger.used;
    case kPeak: return ledger.peak;
    case kCap: return ledger.cap;
    case kOccupied: return ledger.occupied;
    case kAllocations: return ledger.allocations;
    case kRefusals: return ledger.refusals;
    case kInjected: return ledger.injected;
    default: return -1;
  }
}

SIM_API int64_t sim_pinned_bytes() {
  std::lock_guard lock(sim::pinned_mutex);
  int64_t total = 0;
  for (const auto& [start, bytes] : sim::pinned_blocks) {
    total += static_cast<int64_t>(bytes);
  }
  return total;
}

SIM_API void sim_set_cap(int device, int64_t bytes) {
  std::lock_guard lock(sim::ledgers_mutex);
  sim::ledgers[device].cap = bytes;
}

SIM_API void sim_occupy(int device, int64_t bytes) {
  std::lock_guard lock(sim::ledgers_mutex);
  sim::ledgers[device].occupied = bytes;
}

// `device` -1 counts the allocations of all devices together; `nth` 0 disarms.
SIM_API void sim_fail_at(int device, int64_t nth, int persistent) {
  std::lock_guard lock(sim::ledgers_mutex);
  auto& failure = device < 0 ? sim::failure_anywhere : sim::ledgers[device].failure;
  failure = sim::Failure{nth > 0, persistent != 0, nth};
}

// Counters to zero, failures disarmed, peak to what is in use.
SIM_API void sim_reset(int device) {
  std::lock_guard lock(sim::ledgers_mutex);
  auto& ledger = sim::ledgers[device];
  const auto cap = ledger.cap;
  const auto used = ledger.used;
  ledger = sim::Ledger{};
  ledger.cap = cap;
  ledger.used = ledger.peak = used;
  sim::failure_anywhere = sim::Failure{};
}

SIM_API void sim_set_enabled(int on) {
  sim::is_enabled = on != 0;
}

SIM_API int sim_enabled() {
  return sim::enabled();
}

SIM_API int sim_devices() {
  return sim::configured_devices();
}

SIM_API int sim_max_devices() {
  return sim::kMaxDevices;
}

// Before the first use only: tensors remember their device's index.
SIM_API void sim_set_devices(int count) {
  sim::device_total = count;
}

}  // extern "C"
