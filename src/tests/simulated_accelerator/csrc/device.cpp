// What torch asks of an accelerator besides kernels: current device, streams, events, generators, hooks.
#include "device.h"

#include "memory.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>

#include "operators.h"

namespace sim {
namespace {

thread_local std::array<c10::StreamId, kMaxDevices> thread_streams{};
std::atomic<c10::StreamId> last_stream{0};

using Clock = std::chrono::steady_clock;

struct Event {
  Clock::time_point recorded;
};

c10::DeviceIndex index_or_current(c10::DeviceIndex index) {
  return index < 0 ? current_device() : index;
}

// Work runs at once and in order, in the thread that asks for it: streams are numbers, and every event has happened.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }

  c10::Device exchangeDevice(c10::Device device) const override {
    return {kType, exchange_device(index_or_current(device.index()))};
  }
  c10::Device getDevice() const override { return {kType, current_device()}; }
  void setDevice(c10::Device device) const override { exchange_device(index_or_current(device.index())); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { unchecked_set_device(device.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return enabled() ? configured_devices() : 0; }
  c10::DeviceCapability getDeviceCapability(c10::Device /*device*/) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    const auto index = index_or_current(device.index());
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), thread_streams.at(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, index_or_current(device.index())));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*high*/) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index_or_current(device.index())), ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    thread_streams.at(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& /*stream*/) const override { return true; }
  void synchronizeStream(const c10::Stream& /*stream*/) const override {}
  void synchronizeDevice(c10::DeviceIndex /*device*/) const override {}

  void record(void** event, const c10::Stream& /*stream*/, c10::DeviceIndex /*device*/, c10::EventFlag /*flag*/)
      const override {
    if (!*event) {
      *event = new Event;
    }
    static_cast<Event*>(*event)->recorded = Clock::now();
  }
  void destroyEvent(void* event, c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void block(void* /*event*/, const c10::Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override { return true; }
  void synchronizeEvent(void* /*event*/) const override {}
  double elapsedTime(void* first, void* second, c10::DeviceIndex /*device*/) const override {
    const std::chrono::duration<double, std::milli> passed =
        static_cast<Event*>(second)->recorded - static_cast<Event*>(first)->recorded;
    return passed.count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// A CPU generator that says it lives on the device: kernels run on the CPU and draw from the inner one.
struct Generator final : c10::GeneratorImpl {
  Generator(c10::DeviceIndex index, at::Generator inner)
      : c10::GeneratorImpl({kType, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(std::move(inner)) {}

  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), inner.clone()); }

  at::Generator inner;
};

at::Generator make_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index_or_current(index), at::detail::createCPUGenerator());
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return enabled(); }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override { return enabled(); }
  c10::DeviceIndex deviceCount() const override { return enabled() ? configured_devices() : 0; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override { return make_generator(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    static std::array<at::Generator, kMaxDevices> generators;
    static const bool made = [] {
      for (c10::DeviceIndex index = 0; index < kMaxDevices; ++index) {
        generators[index] = make_generator(index);
      }
      return true;
    }();
    (void)made;
    return generators.at(index_or_current(device));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

}  // namespace

at::Generator cpu_generator(const at::Generator& generator) {
  return generator.device().type() == kType ? generator.get<Generator>()->inner : generator;
}

at::Generator default_cpu_generator(c10::DeviceIndex device) {
  return cpu_generator(at::detail::getPrivateUse1Hooks().getDefaultGenerator(device));
}

}  // namespace sim

#define SIM_API __attribute__((visibility("default")))

extern "C" {

SIM_API void sim_register_hooks() {
  at::RegisterPrivateUse1HooksInterface(new sim::Hooks);
}

SIM_API void sim_seed(int device, uint64_t seed) {
  auto generator = at::detail::getPrivateUse1Hooks().getDefaultGenerator(static_cast<c10::DeviceIndex>(device));
  std::lock_guard lock(generator.mutex());
  generator.set_current_seed(seed);
}

SIM_API int sim_current_device() {
  return sim::current_device();
}

}  // extern "C"
