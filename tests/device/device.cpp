// A device for tests that is not the CPU and needs no hardware: torch's private-use backend over memory of this process.
//
// Tensors have a device of their own, so that torch and this file refuse what a GPU refuses: tensors of two devices in one
// operation, and memory of the device in code for the CPU. Copies that do not block are done when their stream comes to them, and
// no sooner than the host may expect it, so that a missing wait shows. `order.h` says who may use memory when.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include "order.h"

namespace standin {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = take(size, current_device);
    return {pointer, pointer, &release, c10::Device(TYPE, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
DeviceAllocator device_allocator;
REGISTER_ALLOCATOR(TYPE, &device_allocator);

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = take_pinned(size);
    return {pointer, pointer, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current_device = device.index() < 0 ? current_device : device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(TYPE, current_device); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchangeDevice(device); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  static int index_of(c10::Device device) { return device.index() < 0 ? current_device : device.index(); }
  static c10::Stream make(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(TYPE, index_of(device)), id);
  }
  static c10::StreamId key(const c10::Stream& stream) { return key_of(stream.device_index(), stream.id()); }
  c10::Stream getStream(c10::Device device) const override { return make(device, current_stream[index_of(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return make(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    std::lock_guard guard(state().mutex);
    return make(device, ++state().streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard guard(state().mutex);
    if (*event == nullptr) *event = new Event();
    auto* made = static_cast<Event*>(*event);
    begin(key(stream));
    made->clock = state().streams[key(stream)], made->stream = key(stream);
    state().log.push_back("record " + name_of(key(stream)));
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::lock_guard guard(state().mutex);
    if (event == nullptr) return;
    auto* made = static_cast<Event*>(event);
    run_waiting(made->stream);
    merge(state().streams[key(stream)], made->clock);
    state().log.push_back(name_of(key(stream)) + " waits for " + name_of(made->stream));
  }
  bool queryEvent(void* event) const override {
    std::lock_guard guard(state().mutex);
    return event == nullptr || state().waiting[static_cast<Event*>(event)->stream].empty();
  }
  void synchronizeEvent(void* event) const override {
    std::lock_guard guard(state().mutex);
    if (event == nullptr) return;
    auto* made = static_cast<Event*>(event);
    run_waiting(made->stream);
    host_knows(made->clock);
    state().log.push_back("the host waits for " + name_of(made->stream));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  bool queryStream(const c10::Stream& stream) const override {
    std::lock_guard guard(state().mutex);
    return state().waiting[key(stream)].empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    std::lock_guard guard(state().mutex);
    run_waiting(key(stream));
    host_knows(state().streams[key(stream)]);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    std::lock_guard guard(state().mutex);
    std::vector<c10::StreamId> streams;
    for (const auto& [stream, clock] : state().streams) streams.push_back(stream);
    for (auto stream : streams) run_waiting(stream), host_knows(state().streams[stream]);
    state().log.push_back("synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    std::lock_guard guard(state().mutex);
    auto found = state().blocks.find(data.get_context());
    if (found != state().blocks.end()) found->second.recorded.push_back(key(stream));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 2; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current_device, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current_device, device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(TYPE, current_device); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto made = device_allocator.allocate(size);
    std::memcpy(made.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr(std::move(made));
    storage.set_nbytes(size);
  }
};

void* block_of(const at::Tensor& tensor) { return tensor.storage().data_ptr().get_context(); }

// The device's memory as a tensor of the CPU, for this file alone.
at::Tensor bare(const at::Tensor& tensor) {
  if (tensor.device().type() != TYPE) return tensor;
  auto options = tensor.options().device(c10::kCPU);
  auto flat = at::from_blob(tensor.storage().mutable_data(), {static_cast<int64_t>(tensor.storage().nbytes())}, options.dtype(at::kByte));
  at::Tensor made = at::empty({0}, options);
  made.set_(flat.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  return made;
}

void copy_bare(const at::Tensor& from, const at::Tensor& to) {
  at::AutoDispatchBelowAutograd below;
  bare(to).copy_(bare(from));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool is_non_blocking) {
  if (is_inside) {
    copy_bare(from, to);
    return to;
  }
  const auto& on_device = from.device().type() == TYPE ? from : to;
  int device = on_device.device().index();
  std::lock_guard guard(state().mutex);
  auto stream = here(device);
  run_waiting(stream);
  auto time = begin(stream);
  if (from.device().type() == TYPE) use(block_of(from), false, stream, time, "a copy");
  if (to.device().type() == TYPE) use(block_of(to), true, stream, time, "a copy");
  bool is_inner = from.device().type() == TYPE && to.device().type() == TYPE;
  const auto& on_host = from.device().type() == TYPE ? to : from;
  if (is_inner || !is_non_blocking || !on_host.is_pinned()) {
    copy_bare(from, to);
    if (!is_inner) host_knows(state().streams[stream]);
    return to;
  }
  state().log.push_back("copy on " + name_of(stream));
  if (to.device().type() != TYPE) std::memset(to.mutable_data_ptr(), 0xFF, to.nbytes());
  state().waiting[stream].push_back([from = from, to = to] { copy_bare(from, to); });
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

// Any operation that has no kernel here: on the CPU, with copies, once its tensors are found to be of one device.
void on_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const auto& schema = operation.schema();
  size_t count = schema.arguments().size(), start = stack->size() - count;
  std::string name = schema.operator_name().name;
  int device = -1;
  std::string other;
  std::vector<std::pair<void*, bool>> used;
  auto look = [&](const at::Tensor& tensor, bool writes) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == TYPE) {
      if (device >= 0 && device != tensor.device().index()) other = "standin:" + std::to_string(tensor.device().index());
      device = tensor.device().index();
      used.emplace_back(block_of(tensor), writes);
    } else if (tensor.dim() > 0 || writes) {
      other = tensor.device().str();
    }
  };
  for (size_t number = 0; number < count; number++) {
    const auto& value = (*stack)[start + number];
    const auto* alias = schema.arguments()[number].alias_info();
    bool writes = alias != nullptr && alias->isWrite();
    if (value.isTensor()) look(value.toTensor(), writes);
    if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) look(tensor, writes);
    if (value.isOptionalTensorList())
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList()) if (tensor) look(*tensor, writes);
  }
  if (device >= 0 && !other.empty())
    throw std::runtime_error("Expected all tensors to be on the same device: " + name + " has some on standin:" + std::to_string(device) +
                             " and some on " + other);
  std::lock_guard guard(state().mutex);
  auto stream = here(std::max(device, 0));
  if (!is_inside) {
    run_waiting(stream);
    auto time = begin(stream);
    for (const auto& [pointer, writes] : used) use(pointer, writes, stream, time, name);
  }
  bool before = std::exchange(is_inside, true);
  try {
    at::native::cpu_fallback(operation, stack, /*error_on_views=*/true);
  } catch (...) {
    is_inside = before;
    throw;
  }
  is_inside = before;
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  auto made = at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                        c10::dtype_or_default(dtype), format);
  return made;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Scalar read_number(const at::Tensor& tensor) { return tensor.cpu().item(); }

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

// Of integers, too, as a GPU has it and the CPU has not.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  return at::histc(self.cpu().to(at::kDouble), bins, min, max).to(self.scalar_type()).to(self.device());
}

void record_stream(at::Tensor& tensor, at::Stream stream) { Guard().recordDataPtrOnStream(tensor.storage().data_ptr(), stream); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_number);
  library.impl("resize_", resize);
  library.impl("histc", histc);
  library.impl("record_stream", record_stream);
  library.impl("as_strided", [](const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
  });
  library.impl("view", [](const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); });
  library.impl("_reshape_alias", [](const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
  });
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& { return at::native::set_(self, source); });
  library.impl("set_.source_Storage_storage_offset",
               [](at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) -> at::Tensor& {
                 return at::cpu::set_(self, source, offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
               });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

}  // namespace standin

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace standin;
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  module.def("held", [](int device) { return state().held[device]; });
  module.def("most", [](int device) { return state().most[device]; });
  module.def("forget_most", [](int device) { state().most[device] = state().held[device]; state().pinned_most = state().pinned_held; });
  module.def("pinned_held", [] { return state().pinned_held; });
  module.def("pinned_most", [] { return state().pinned_most; });
  module.def("device", [] { return current_device; });
  module.def("set_device", [](int device) { current_device = device; });
  module.def("take_faults", [] { std::lock_guard guard(state().mutex); return std::exchange(state().faults, {}); });
  module.def("take_log", [] { std::lock_guard guard(state().mutex); return std::exchange(state().log, {}); });
}
