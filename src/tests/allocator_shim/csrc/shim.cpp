// Stands in front of the C library's allocator (LD_PRELOAD), and refuses one allocation, or all from one on, or those
// beyond a cap.
//
// Three kinds are told apart, each with a least size of its own, below which an allocation is neither counted nor
// refused:
//   aligned  posix_memalign, aligned_alloc, memalign: torch's tensors, and scratch and code of its kernels;
//   heap     malloc, calloc, realloc, and so operator new, Python's larger objects, numpy and Rust;
//   mapped   mmap: files, arenas of Python's small objects, code that kernels are compiled to.
//
// Calls from spared code (of a library that ends the process where it is refused memory) are never counted nor refused.
// Where nothing is armed, every call goes straight on. What is refused was never asked for: nothing leaks.

#include <malloc.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
}

namespace {

enum Kind { kAligned, kHeap, kMapped, kKinds };

std::atomic<bool> armed{false};
std::atomic<bool> persistent{false};
std::atomic<int64_t> nth{0};
std::atomic<size_t> least[kKinds];
std::atomic<int64_t> total{0};
std::atomic<int64_t> refusals{0};
std::atomic<int64_t> live{0};
std::atomic<int64_t> cap{INT64_MAX};

struct Range {
  uintptr_t begin;
  uintptr_t end;
};
constexpr int kMostSpared = 16;
Range spared[kMostSpared];
std::atomic<int> spared_count{0};

bool is_spared(const void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  for (int i = 0; i < spared_count.load(std::memory_order_acquire); ++i) {
    if (spared[i].begin <= address && address < spared[i].end) {
      return true;
    }
  }
  return false;
}

bool is_chosen(int64_t number) {
  const int64_t from = nth.load(std::memory_order_relaxed);
  return from != 0 && (persistent.load(std::memory_order_relaxed) ? number >= from : number == from);
}

bool refused(Kind kind, size_t size, const void* caller) {
  if (!armed.load(std::memory_order_acquire) || size < least[kind].load(std::memory_order_relaxed) ||
      is_spared(caller)) {
    return false;
  }
  const bool chosen = is_chosen(total.fetch_add(1) + 1);
  const bool beyond = kind != kMapped && live.load() + static_cast<int64_t>(size) > cap.load(std::memory_order_relaxed);
  if (chosen || beyond) {
    refusals.fetch_add(1);
    errno = ENOMEM;
  }
  return chosen || beyond;
}

int64_t size_of(void* memory) { return static_cast<int64_t>(malloc_usable_size(memory)); }

void* taken(void* memory) {
  if (memory != nullptr) {
    live.fetch_add(size_of(memory), std::memory_order_relaxed);
  }
  return memory;
}

void* aligned(size_t alignment, size_t size, const void* caller) {
  return refused(kAligned, size, caller) ? nullptr : taken(__libc_memalign(alignment, size));
}

void* mapped(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, size, protection, flags, file, offset));
}

}  // namespace

#define CALLER __builtin_return_address(0)
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* malloc(size_t size) { return refused(kHeap, size, CALLER) ? nullptr : taken(__libc_malloc(size)); }

EXPORTED void* calloc(size_t count, size_t size) {
  size_t bytes = 0;
  const bool counts = !__builtin_mul_overflow(count, size, &bytes);
  return counts && refused(kHeap, bytes, CALLER) ? nullptr : taken(__libc_calloc(count, size));
}

EXPORTED void* realloc(void* old, size_t size) {
  if (size != 0 && refused(kHeap, size, CALLER)) {
    return nullptr;
  }
  const int64_t before = old == nullptr ? 0 : size_of(old);
  void* const found = __libc_realloc(old, size);
  if (found != nullptr || size == 0) {
    live.fetch_sub(before, std::memory_order_relaxed);
  }
  return taken(found);
}

EXPORTED void free(void* memory) {
  if (memory != nullptr) {
    live.fetch_sub(size_of(memory), std::memory_order_relaxed);
    __libc_free(memory);
  }
}

EXPORTED void* memalign(size_t alignment, size_t size) { return aligned(alignment, size, CALLER); }

EXPORTED void* aligned_alloc(size_t alignment, size_t size) { return aligned(alignment, size, CALLER); }

EXPORTED int posix_memalign(void** result, size_t alignment, size_t size) {
  if (alignment < sizeof(void*) || (alignment & (alignment - 1)) != 0) {
    return EINVAL;
  }
  void* const found = aligned(alignment, size, CALLER);
  if (found == nullptr) {
    return ENOMEM;
  }
  *result = found;
  return 0;
}

EXPORTED void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  return refused(kMapped, size, CALLER) ? MAP_FAILED : mapped(address, size, protection, flags, file, offset);
}

EXPORTED void* mmap64(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  return refused(kMapped, size, CALLER) ? MAP_FAILED : mapped(address, size, protection, flags, file, offset);
}

// Begins a count: the allocation that has `number` (none for 0) is refused, and all after it where `from_there_on`.
EXPORTED void shim_arm(int64_t number, int from_there_on, size_t aligned, size_t heap, size_t mapped) {
  armed.store(false);
  least[kAligned].store(aligned);
  least[kHeap].store(heap);
  least[kMapped].store(mapped);
  total.store(0);
  refusals.store(0);
  nth.store(number);
  persistent.store(from_there_on != 0);
  armed.store(true, std::memory_order_release);
}

EXPORTED void shim_disarm() {
  armed.store(false);
  cap.store(INT64_MAX);
}

EXPORTED void shim_pause(int paused) { armed.store(paused == 0, std::memory_order_release); }

// Lets armed kinds have no more than `bytes` beyond what lives now.
EXPORTED void shim_cap(int64_t bytes) { cap.store(live.load() + bytes); }

// Spares calls from [begin, end) from now on; returns whether there was room for it.
EXPORTED int shim_spare(uintptr_t begin, uintptr_t end) {
  if (is_spared(reinterpret_cast<const void*>(begin))) {
    return 1;
  }
  const int count = spared_count.load();
  if (count == kMostSpared) {
    return 0;
  }
  spared[count] = {begin, end};
  spared_count.store(count + 1, std::memory_order_release);
  return 1;
}

EXPORTED int64_t shim_counted() { return total.load(); }
EXPORTED int64_t shim_refusals() { return refusals.load(); }
// Bytes of the heap that are in use, aligned ones included.
EXPORTED int64_t shim_live() { return live.load(); }
