#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

namespace sim {

// Storages seen on the CPU. One per device storage, so that the CPU kernels see which tensors share memory.
using StorageView = std::pair<c10::StorageImpl*, c10::Storage>;

// A CPU storage over the same bytes. It does not own them; a kernel that resizes it gets CPU memory of its own.
c10::Storage cpu_view(const c10::Storage& storage);
// A CPU tensor over the same bytes as a device tensor, through `storage` (the view of the tensor's storage).
at::Tensor cpu_view(const at::Tensor& tensor, const c10::Storage& storage);

// Grows or shrinks a device storage to `bytes`, keeping its content.
void resize_storage(const c10::Storage& storage, size_t bytes);

// Uninitialized device memory, with the given strides.
at::Tensor empty_on(c10::Device device, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

}  // namespace sim
