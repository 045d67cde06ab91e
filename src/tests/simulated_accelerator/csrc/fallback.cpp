// Every operator that operators.cpp does not bring runs the CPU's kernel over the device's own bytes.
//
// Arguments become CPU views without a copy, so that writes of in-place and out= operators reach the tensors (and
// whatever shares their memory). Results that share memory with an argument become views of it; all others are
// allocated on the device. What a kernel needs in between is CPU memory and is not counted.
#include "device.h"
#include "memory.h"
#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <torch/library.h>

#include <string_view>
#include <vector>

namespace sim {
namespace {

using torch::jit::Stack;

struct Borrowed {
  at::Tensor original;
  at::Tensor view;
};

bool accepts_host_indices(std::string_view name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
      name == "aten::index_put" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
}

// Raised as CUDA does: a host tensor that reaches a device's kernel was not handed over.
class Devices {
 public:
  explicit Devices(const c10::OperatorHandle& op) : schema_(op.schema()) {}

  void see(const at::Tensor& tensor, size_t argument) {
    if (!tensor.defined()) {
      return;
    }
    const bool host = tensor.device().is_cpu();
    // A host scalar is passed by value; indices may stay on the host.
    if (host && (tensor.dim() == 0 || (argument > 0 && accepts_host_indices(schema_.name())))) {
      return;
    }
    if (tensor.device().type() == kType) {
      device_ = device_.value_or(tensor.device());
    }
    first_ = first_.value_or(tensor.device());
    TORCH_CHECK(
        *first_ == tensor.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
        *first_, " and ", tensor.device(), "! (when checking argument ", schema_.arguments()[argument].name(),
        " in method ", schema_.name(), ")");
  }

  void see(c10::Device device) { device_ = device; }

  // Where results go. All the operator's tensors may have been host scalars: then the current device.
  c10::Device target() const { return device_.value_or(c10::Device(kType, current_device())); }

 private:
  const c10::FunctionSchema& schema_;
  std::optional<c10::Device> first_;
  std::optional<c10::Device> device_;
};

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), stack_(stack), devices_(op) {}

  void run() {
    lend_arguments();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    kernel().redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    for (auto& borrowed : borrowed_) {
      take_back(borrowed);
    }
    const size_t results = op_.schema().returns().size();
    for (size_t i = stack_->size() - results; i < stack_->size(); ++i) {
      return_value((*stack_)[i]);
    }
  }

 private:
  // Convolution has a name of its own on devices that are not built in.
  c10::OperatorHandle kernel() const {
    if (op_.schema().name() == "aten::convolution_overrideable") {
      return c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
    }
    return op_;
  }

  void lend_arguments() {
    const auto& parameters = op_.schema().arguments();
    const size_t first = stack_->size() - parameters.size();
    for (size_t i = 0; i < parameters.size(); ++i) {
      see((*stack_)[first + i], i);
    }
    for (size_t i = 0; i < parameters.size(); ++i) {
      (*stack_)[first + i] = lend((*stack_)[first + i], parameters[i]);
    }
  }

  void see(const c10::IValue& value, size_t argument) {
    if (value.isTensor()) {
      devices_.see(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) {
        devices_.see(tensor, argument);
      }
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        devices_.see(tensor.value_or(at::Tensor()), argument);
      }
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      const auto device = value.toDevice();
      devices_.see(device.has_index() ? device : c10::Device(kType, current_device()));
    }
  }

  c10::IValue lend(const c10::IValue& value, const c10::Argument& parameter) {
    if (value.isTensor()) {
      return lend(value.toTensor());
    }
    if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) {
        tensor = lend(tensor);
      }
      return c10::IValue(tensors);
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        tensors.push_back(tensor ? std::optional(lend(*tensor)) : std::nullopt);
      }
      return c10::IValue(tensors);
    }
    if (value.isDevice() && value.toDevice().type() == kType) {
      return c10::Device(c10::DeviceType::CPU);
    }
    if (value.isGenerator()) {
      return cpu_generator(value.toGenerator());
    }
    if (value.isNone() && takes_generator(parameter)) {
      return default_cpu_generator(devices_.target().index());
    }
    return value;
  }

  static bool takes_generator(const c10::Argument& parameter) {
    const auto optional = parameter.type()->cast<c10::OptionalType>();
    return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }

  at::Tensor lend(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) {
      return tensor;
    }
    TORCH_CHECK(tensor.layout() == at::kStrided, "the simulated accelerator holds dense tensors only");
    auto view = cpu_view(tensor, storage_view(tensor.storage()));
    borrowed_.push_back({tensor, view});
    return view;
  }

  const c10::Storage& storage_view(const c10::Storage& storage) {
    for (const auto& [original, view] : storages_) {
      if (original == storage.unsafeGetStorageImpl()) {
        return view;
      }
    }
    return storages_.emplace_back(storage.unsafeGetStorageImpl(), cpu_view(storage)).second;
  }

  // An out= operator may have resized what it was given: the device's tensor follows.
  void take_back(const Borrowed& borrowed) {
    const auto& [original, view] = borrowed;
    const bool moved = view.storage().data() != to_host_address(original.storage().data());
    if (!moved && view.sizes() == original.sizes() && view.strides() == original.strides()) {
      return;
    }
    if (view.storage().nbytes() > original.storage().nbytes()) {
      resize_storage(original.storage(), view.storage().nbytes());
    }
    original.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
    if (moved && view.numel() > 0) {
      original.copy_(view);
    }
  }

  void return_value(c10::IValue& result) {
    if (result.isTensor()) {
      result = to_device(result.toTensor());
    } else if (result.isTensorList()) {
      auto tensors = result.toTensorVector();
      for (auto& tensor : tensors) {
        tensor = to_device(tensor);
      }
      result = tensors;
    }
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined()) {
      return result;
    }
    for (const auto& [original, view] : borrowed_) {
      if (result.is_same(view)) {
        return original;
      }
    }
    for (const auto& [original, view] : borrowed_) {
      if (result.has_storage() && result.storage().is_alias_of(view.storage())) {
        return view_of(original, result);
      }
    }
    auto moved = empty_on(devices_.target(), result.sizes(), result.strides(), result.scalar_type());
    moved.copy_(result);
    return moved;
  }

  static at::Tensor view_of(const at::Tensor& base, const at::Tensor& shape) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), shape.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
    return view;
  }

  const c10::OperatorHandle& op_;
  Stack* stack_;
  Devices devices_;
  std::vector<Borrowed> borrowed_;
  std::vector<StorageView> storages_;
};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  Call(op, stack).run();
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  // One fused kernel each, as on CUDA: decomposed, attention would keep its whole score matrix in device memory, and
  // both would round otherwise than on the CPU.
  library.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  library.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  // Torch's own version of this one says that it is missing.
  library.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace sim
